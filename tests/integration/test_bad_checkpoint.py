"""A checkpoint that cannot serve ends a run as other mistakes do: one line that helps, exit code 2, no file written."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.runs import OFFLOADED, base_flags, ranks, train
from tests.integration.test_bad_input import assert_one_clear_line, files_below, run_into_error

OPTIMIZER_STATES = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
ZERO_1 = ["--zero-stage", "1", "--train-iters", "2"]


@dataclass(frozen=True)
class Case:
    """Flags of a run that continues from a ZeRO-1 checkpoint of one rank, and words that the answer must hold."""

    name: str
    flags: list[str]
    words: list[str]
    num_ranks: int = 1
    damage: Callable[[Path], None] = lambda checkpoint: None


def _cut_weights(checkpoint: Path) -> None:
    path = checkpoint / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])


def _remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def _flip_a_byte_of_the_moments(checkpoint: Path) -> None:
    path = checkpoint / OPTIMIZER_STATES
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CASES = [
    Case("another width", ["--hidden-size", "64"], ["--hidden-size is 32 in the checkpoint and 64 in the flags"]),
    Case("counters missing", [], ["train_state.json is missing"], damage=_remove("train_state.json")),
    Case("shard missing", [], [f"{OPTIMIZER_STATES} is missing"], damage=_remove(OPTIMIZER_STATES)),
    Case("flipped byte", [], [f"{OPTIMIZER_STATES} is damaged: its SHA-256"], damage=_flip_a_byte_of_the_moments),
    Case("no manifest", [], ["no manifest.json", "--allow-unverified-checkpoint"], damage=_remove("manifest.json")),
    Case("one that is not there", ["--ckpt-step", "7"], ["global_step7 is missing", "name another --ckpt-step"]),
    Case("another vocabulary", ["--vocab-size", "300"], ["128", "384"]),
    Case("another number of ranks", [], ["1 ranks", "2 ranks"], num_ranks=2),
    Case("another ZeRO stage", ["--zero-stage", "3"], ["--zero-stage", "1", "3"]),
    Case("another number format", ["--bf16"], ["--bf16"]),
    Case("damaged weights", [], ["mp_rank_00_model_states.pt is damaged"], damage=_cut_weights),
]


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of one rank under ZeRO-1, at iteration 2."""
    folder = tmp_path_factory.mktemp("bad_checkpoint")
    train([*base_flags(corpus), *ZERO_1, "--save", str(folder / "saved")], folder / "events")
    return folder / "saved"


def assert_refused(corpus: Path, saved: Path, folder: Path, case: Case) -> None:
    own = folder / "saved"
    shutil.copytree(saved, own)
    case.damage(own / "global_step2")
    before = files_below(folder)
    flags = [*base_flags(corpus), *ZERO_1, "--load", str(own), "--save", str(folder / "new"), *case.flags]
    assert_one_clear_line(run_into_error(flags, case.num_ranks)[0], case.words)
    assert files_below(folder) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_checkpoint_that_cannot_serve_is_refused(corpus: Path, saved: Path, tmp_path: Path, case: Case) -> None:
    assert_refused(corpus, saved, tmp_path, case)


def test_a_damaged_shard_of_another_rank_costs_the_steps_since_the_checkpoint_before(
    corpus: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    flags = [*base_flags(corpus), *OFFLOADED, *ranks(2, 3), "--save", str(saved), "--load", str(saved)]
    whole = train([*flags, "--train-iters", "4", "--save-interval", "2"], tmp_path / "whole", 2)
    shard = saved / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    resumed = train([*flags, "--train-iters", "4"], tmp_path / "resumed", 2)
    assert resumed.losses == {step: whole.losses[step] for step in (3, 4)}
    (warning,) = [line for line in resumed.output.splitlines() if line.startswith("WARNING: the checkpoint")]
    assert f"{shard.name} is damaged" in warning
    assert "global_step2, in its place" in warning
