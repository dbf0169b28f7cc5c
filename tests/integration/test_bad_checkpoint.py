"""A checkpoint that cannot serve ends a run as other mistakes do: one line that helps, exit code 2, no file written."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.runs import base_flags, train
from tests.integration.test_bad_input import assert_one_clear_line, files_below, run_into_error

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


def _remove_counters(checkpoint: Path) -> None:
    (checkpoint / "train_state.json").unlink()


CASES = [
    Case("another width", ["--hidden-size", "64"], ["--hidden-size is 32 in the checkpoint and 64 in the flags"]),
    Case("not whole", [], ["names the checkpoint 'global_step2'", "not whole"], damage=_remove_counters),
    Case("another vocabulary", ["--vocab-size", "300"], ["128", "384"]),
    Case("another number of ranks", [], ["1 ranks", "2 ranks"], num_ranks=2),
    Case("another ZeRO stage", ["--zero-stage", "3"], ["--zero-stage", "1", "3"]),
    Case("another number format", ["--bf16"], ["--bf16"]),
    Case("damaged weights", [], ["mp_rank_00_model_states.pt"], damage=_cut_weights),
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
