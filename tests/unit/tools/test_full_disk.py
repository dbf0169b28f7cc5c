"""A tool that runs out of room ends with one line and leaves nothing of its output."""

import resource
from contextlib import contextmanager

import pytest
import torch

from megatron.weights.universal_checkpoint import write_universal_checkpoint
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import save

NUM_TENSORS, NUMEL = 4, 30_000


class Source:
    """A small training state."""

    names = tuple(f"layers.{number}.weight" for number in range(NUM_TENSORS))
    step = 3
    loss_scale: dict[str, float] = {}  # noqa: RUF012 - read only

    def shape(self, name):
        return (NUMEL,)

    def parts(self, name):
        return ("fp32", "exp_avg", "exp_avg_sq")

    def read(self, name, part, start, count):
        return torch.ones(count)


@contextmanager
def files_of_at_most(num_bytes):
    """Let the operating system refuse what a file would hold beyond this, as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def sources(tmp_path):
    """What the tools read: a Hugging Face folder, our weights of it, and a training state."""
    save("llama", tmp_path / "theirs", intermediate_size=4096)
    assert run_tool("hf2megads_weight_converter", "to-megatron", tmp_path / "theirs", tmp_path / "ours") == 0
    write_universal_checkpoint(Source(), tmp_path / "run" / "global_step3")
    return tmp_path


@pytest.mark.parametrize(
    "tool, arguments, target",
    [
        ("hf2megads_weight_converter", ("to-megatron", "theirs", "new/out"), "new/out"),
        ("hf2megads_weight_converter", ("to-hf", "ours", "new/out"), "new/out"),
        ("consolidate_checkpoint", ("ours", "new/out"), "new/out"),
        ("consolidate_checkpoint", ("run/global_step3", "new/out"), "new/out"),
        ("make_universal_checkpoint", ("run/global_step3", "new"), "new/global_step3"),
    ],
)
@pytest.mark.parametrize("room", [20_000, 300_000])  # in the first tensor, and after some
def test_no_room_is_one_line_and_leaves_nothing(sources, capsys, tool, arguments, target, room):
    if tool == "make_universal_checkpoint":
        room = min(room, 4 * NUMEL)
    words = [word if word.startswith("to-") else sources / word for word in arguments]
    capsys.readouterr()
    with files_of_at_most(room):
        assert run_tool(tool, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {sources / target} cannot be written: File too large; nothing is left of it")
    assert list((sources / "new").rglob("*")) == []
    assert run_tool(tool, *words) == 0
