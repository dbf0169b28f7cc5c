"""tools/inspect_checkpoint.py, and the errors of the tools that write."""

import json
from pathlib import Path

import pytest
import torch

from megatron.weights.safetensors_folder import SafetensorsWriter
from megatron.weights.source import MOMENTS, PARTS
from megatron.weights.universal_checkpoint import UniversalCheckpoint, write_universal_checkpoint
from tests.unit.tools.tool import run_tool

CONFIG = {"model": {"num_layers": 2}, "training": {"seed": 1}, "given": ["seed"]}


class Trained:
    """Two parameters and their moments."""

    names = ("body.weight", "norm.bias")
    step: int | None = 7
    loss_scale = {"cur_scale": 1024.0, "cur_iter": 9}  # noqa: RUF012

    def __init__(self, add: float = 0.0) -> None:
        self._values = {name: torch.arange(6.0) + number + add for number, name in enumerate(self.names)}

    def shape(self, name: str) -> tuple[int, ...]:
        return (2, 3)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def get(self, name: str) -> torch.Tensor:
        return self._values[name].view(2, 3)

    def parts(self, name: str) -> tuple[str, ...]:
        return PARTS if name == "body.weight" else PARTS[:1]

    def read(self, name: str, part: str, start: int, count: int) -> torch.Tensor:
        return self._values[name][start : start + count] * (1 + PARTS.index(part))


def universal(folder: Path, add: float = 0.0, config: dict = CONFIG) -> Path:
    folder.mkdir(parents=True)
    companions = {"config.json": config, "train_state.json": {"iteration": 8, "consumed_tokens": 4096}}
    for name, content in companions.items():
        (folder / name).write_text(json.dumps(content))
    write_universal_checkpoint(Trained(add), folder / "checkpoint", [folder / name for name in companions])
    return folder / "checkpoint"


def safetensors(folder: Path, config: dict | None = None, **tensors: torch.Tensor) -> Path:
    with SafetensorsWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        if config is not None:
            (writer.staging / "config.json").write_text(json.dumps(config))
    return folder


def test_a_universal_checkpoint_reads_back_as_it_was_written(tmp_path):
    checkpoint, want = UniversalCheckpoint(universal(tmp_path / "u")), Trained()
    assert (checkpoint.names, checkpoint.step, checkpoint.loss_scale) == (want.names, 7, want.loss_scale)
    for name in want.names:
        assert (checkpoint.shape(name), checkpoint.parts(name)) == ((2, 3), want.parts(name))
        assert torch.equal(checkpoint.get(name), want.get(name))
        for part in want.parts(name):
            assert torch.equal(checkpoint.read(name, part, 2, 3), want.read(name, part, 2, 3))


def test_a_checkpoint_is_described(tmp_path, capsys):
    assert run_tool("inspect_checkpoint", universal(tmp_path / "u")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("universal checkpoint, optimizer step 7")
    assert lines[1:4] == ["iteration: 8", "consumed_tokens: 4096", "model.num_layers: 2"]
    assert lines[4].split() == ["body.weight", "[2,", "3]", "float32", "0.000", "MiB", "+", *", ".join(MOMENTS).split()]
    assert lines[5].endswith("MiB")
    assert lines[6] == "2 tensors, 12 parameters, 0.0 MiB"


def test_a_folder_of_hugging_face_is_described(tmp_path, capsys):
    folder = safetensors(tmp_path / "hf", {"num_hidden_layers": 3}, **{"model.norm.weight": torch.ones(4).bfloat16()})
    assert run_tool("inspect_checkpoint", folder) == 0
    output = capsys.readouterr().out
    assert "safetensors, without optimizer states" in output
    assert "num_hidden_layers: 3" in output
    assert "model.norm.weight [4]                  bfloat16" in output


def test_the_same_twice_does_not_differ(tmp_path, capsys):
    first, second = universal(tmp_path / "first"), universal(tmp_path / "second", config=CONFIG | {"given": []})
    assert run_tool("inspect_checkpoint", first, "--diff", second) == 0
    assert capsys.readouterr().out == ""


def test_weights_do_not_differ_from_the_checkpoint_that_they_are_of(tmp_path, capsys):
    checkpoint = universal(tmp_path / "u")
    assert run_tool("consolidate_checkpoint", checkpoint, tmp_path / "weights") == 0
    assert run_tool("inspect_checkpoint", tmp_path / "weights", "--diff", checkpoint) == 0
    assert run_tool("consolidate_checkpoint", checkpoint, tmp_path / "half", "--dtype", "fp16", "--one-file") == 0
    capsys.readouterr()
    assert run_tool("inspect_checkpoint", tmp_path / "half", "--diff", checkpoint) == 1
    assert capsys.readouterr().out.splitlines()[0] == "body.weight: [2, 3] float16 and [2, 3] float32"


def test_differences_in_values_and_settings_are_reported(tmp_path, capsys):
    first = universal(tmp_path / "first")
    second = universal(tmp_path / "second", 0.5, {"model": {"num_layers": 3}, "training": {"seed": 1}})
    assert run_tool("inspect_checkpoint", first, "--diff", second) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("body.weight: max difference 5.000e-01, relative 1.6")
    assert [line.split(":")[0] for line in lines] == [
        "body.weight",
        "body.weight exp_avg",
        "body.weight exp_avg_sq",
        "norm.bias",
        "config model.num_layers",
    ]


@pytest.mark.parametrize("tool", ["inspect_checkpoint", "consolidate_checkpoint", "make_universal_checkpoint"])
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, capsys, tool):
    output = [] if tool == "inspect_checkpoint" else [tmp_path / "output"]
    assert run_tool(tool, tmp_path / "absent", *output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'absent'} is not there")
    assert not (tmp_path / "output").exists()


def test_a_universal_checkpoint_needs_moments_and_a_new_name(tmp_path, capsys):
    weights = safetensors(tmp_path / "weights", a=torch.ones(2))
    assert run_tool("make_universal_checkpoint", weights, tmp_path / "output") == 2
    assert "weights alone do not make a universal checkpoint" in capsys.readouterr().err
    checkpoint = universal(tmp_path / "u")
    assert run_tool("make_universal_checkpoint", checkpoint, tmp_path / "output") == 0
    assert (tmp_path / "output" / "latest").read_text() == "checkpoint"
    assert run_tool("make_universal_checkpoint", checkpoint, tmp_path / "output") == 2
    assert "exists; name a new folder" in capsys.readouterr().err
