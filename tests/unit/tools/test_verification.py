"""Every tool that reads weights refuses those that are not what was written, whatever form they have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.weights.manifest import MANIFEST, seal
from megatron.weights.opening import open_state
from megatron.weights.source import WEIGHTS
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import VOCAB, save

TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1]
EVALUATION = [*TOKENIZER, "--scored-tokens", 4, "--contexts", 4, "--text"]
# tool: its arguments, in which IN and OUT are paths
READERS: dict[str, list[object]] = {
    "consolidate_checkpoint": ["IN", "OUT"],
    "make_universal_checkpoint": ["IN", "OUT"],
    "inspect_checkpoint": ["IN"],
    "inspect_checkpoint --diff": ["WHOLE", "--diff", "IN"],
    "hf2megads_weight_converter": ["to-hf", "IN", "OUT"],
    "generate_samples_gpt": ["--load", "IN", *TOKENIZER, "--prompt", "3 4", "--max-new-tokens", 1],
    "eval_long_context": ["perplexity", "--load", "IN", *EVALUATION, "TEXT"],
}
KINDS = ("checkpoints", "universal", "portable")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one small model in each of KINDS, and `other`, a later step of the first."""
    folder = tmp_path_factory.mktemp("whole")
    save("gpt2", folder / "theirs")
    assert run_tool("hf2megads_weight_converter", "to-megatron", folder / "theirs", folder / "portable") == 0
    for step, name in ((7, "checkpoints"), (9, "other")):
        write_checkpoint(folder / name / "global_step7", folder / "portable", step)
        (folder / name / "latest").write_text("global_step7")
    assert run_tool("make_universal_checkpoint", folder / "checkpoints", folder / "universal") == 0
    (folder / "text.txt").write_text(" ".join(str(number % 9) for number in range(30)))
    return folder


def write_checkpoint(path: Path, weights: Path, step: int) -> None:
    """Write what a training of one rank without ZeRO has saved, and the random states of two ranks."""
    path.mkdir(parents=True)
    source = open_state(weights)
    module = {name: source.get(name) * step for name in source.names}
    moments = [
        {"exp_avg": tensor, "exp_avg_sq": tensor, "step": torch.tensor(float(step))} for tensor in module.values()
    ]
    optimizer = {"state": dict(enumerate(moments)), "param_groups": [{}]}
    states = {"module": module, "optimizer": optimizer, "parameter_groups": [list(module)]}
    torch.save(states, path / "mp_rank_00_model_states.pt")
    for rank in (0, 1):
        torch.save(torch.arange(3) + rank, path / f"random_{rank}.pt")
    for name in ("config.json", "layout.json"):
        shutil.copyfile(weights / "config.json", path / name)
    seal(path)


def run_reader(reader: str, whole: Path, path: Path, out: Path, *flags: str) -> int:
    paths = {"IN": path, "OUT": out, "WHOLE": whole / "portable", "TEXT": whole / "text.txt"}
    arguments = [paths.get(str(argument), argument) for argument in READERS[reader]]
    return run_tool(reader.split()[0], *arguments, *flags)


def weights_file(path: Path) -> Path:
    """Return the largest file of a checkpoint or folder."""
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def _flip_a_bit(path: Path, whole: Path) -> None:
    file = weights_file(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _swap_ranks(path: Path, whole: Path) -> None:
    first, second = (next(path.rglob(f"random_{rank}.pt")) for rank in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _take_of_another_step(path: Path, whole: Path) -> None:
    file = weights_file(path)
    shutil.copyfile(weights_file(whole / "other"), file)


def _add_a_file(path: Path, whole: Path) -> None:
    manifest = next(path.rglob(MANIFEST))
    (manifest.parent / "model.safetensors.index.json").write_text("{}")


def _cut_the_manifest(path: Path, whole: Path) -> None:
    manifest = next(path.rglob(MANIFEST))
    manifest.write_bytes(manifest.read_bytes()[:-9])


DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "flipped bit": (_flip_a_bit, "is damaged: its SHA-256 is not the one in manifest.json"),
    "swapped ranks": (_swap_ranks, "random_0.pt is damaged: its SHA-256 is not"),
    "another step": (_take_of_another_step, "is damaged: its SHA-256 is not"),
    "surplus file": (_add_a_file, "model.safetensors.index.json is not listed in manifest.json"),
    "cut manifest": (_cut_the_manifest, "manifest.json is damaged"),
}
CASES = [("checkpoints", damage) for damage in DAMAGES]
CASES += [(kind, damage) for kind in KINDS[1:] for damage in ("flipped bit", "surplus file", "cut manifest")]


@pytest.mark.parametrize("reader", READERS)
def test_weights_that_are_whole_are_read(whole: Path, tmp_path: Path, reader: str) -> None:
    for kind in KINDS:
        if (reader, kind) != ("make_universal_checkpoint", "portable"):  # which has no moments
            expected = 1 if reader.endswith("--diff") and kind != "portable" else 0
            assert run_reader(reader, whole, whole / kind, tmp_path / kind) == expected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind, damage", CASES)
def test_damaged_weights_are_one_error(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str, kind: str, damage: str
) -> None:
    spoil, expected = DAMAGES[damage]
    shutil.copytree(whole / kind, tmp_path / "in")
    spoil(tmp_path / "in", whole)
    assert run_reader(reader, whole, tmp_path / "in", tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert "copy it again" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", READERS)
def test_the_hashes_can_be_left_out(whole: Path, tmp_path: Path, reader: str) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "in")
    _flip_a_bit(tmp_path / "in", whole)
    arguments = (reader, whole, tmp_path / "in", tmp_path / "out")
    assert run_reader(*arguments, "--no-verify-checkpoint") < 2
    next((tmp_path / "in").rglob("random_1.pt")).unlink()
    assert run_reader(*arguments, "--no-verify-checkpoint") == 2


def test_a_checkpoint_of_ours_has_a_manifest_and_one_of_deepspeed_need_not(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "global_step7"
    shutil.copytree(whole / "checkpoints" / "global_step7", path)
    (path / MANIFEST).unlink()
    assert run_tool("inspect_checkpoint", path) == 2
    assert "it has no manifest.json, so its files cannot be verified" in capsys.readouterr().err
    assert run_tool("inspect_checkpoint", path, "--no-verify-checkpoint") == 0
    (path / "layout.json").unlink()
    caplog.clear()
    assert run_tool("inspect_checkpoint", path) == 0
    assert caplog.messages == [f"{path} has no manifest.json: it is read unverified"]


@pytest.mark.parametrize("reader", READERS)
def test_latest_leads_no_reader_out_of_its_folder(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str
) -> None:
    shutil.copytree(whole / "checkpoints" / "global_step7", tmp_path / "ev" / "global_step7")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latest").write_text("../ev/global_step7")
    assert run_reader(reader, whole, tmp_path / "in", tmp_path / "out") == 2
    assert "which is no name of a checkpoint" in capsys.readouterr().err


def test_what_the_tools_write_is_listed(whole: Path) -> None:
    portable = json.loads((whole / "portable" / MANIFEST).read_text())["files"]
    assert portable.keys() == {"model.safetensors"}
    universal = whole / "universal" / "global_step7"
    listed = json.loads((universal / MANIFEST).read_text())["files"].keys()
    files = {file.relative_to(universal).as_posix() for file in universal.rglob("*") if file.is_file()}
    assert listed == files - {MANIFEST}
    assert f"zero/embedding.word_embeddings.weight/{WEIGHTS}.pt" in listed
