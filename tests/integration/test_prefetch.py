"""Batches made ahead change nothing: not the samples, not where a run goes on, and not how it fails."""

from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import Ranks, Run, base_flags, train

UNREADABLE = REPOSITORY / "tests/integration/unreadable.py"
EVALUATION = ["--eval-interval", "2", "--eval-iters", "2"]


def test_a_run_stopped_with_batches_made_ahead_goes_on_with_the_next_sample(corpus: Path, tmp_path: Path) -> None:
    """Four micro-batches a step: six ahead are another step and a half that were made and never taken."""
    flags, saved = [*base_flags(corpus), *EVALUATION, "--train-iters", "6"], str(tmp_path / "saved")

    def run(name: str, depth: int, *extra: str) -> Run:
        return train([*flags, "--prefetch-microbatches", str(depth), *extra], tmp_path / name)

    whole = run("whole", 0)
    first = run("first", 6, "--save", saved, "--exit-interval", "3")
    second = run("second", 7, "--save", saved, "--load", saved)
    assert (list(first.losses), list(second.losses)) == ([1, 2, 3], [4, 5, 6])
    assert first.losses | second.losses == whole.losses
    assert first.validation_losses | second.validation_losses == whole.validation_losses


@pytest.mark.parametrize("depth", [0, 3])
def test_a_sample_that_cannot_be_read_ends_the_run_at_its_step_with_the_traceback(corpus: Path, depth: int) -> None:
    flags = [*base_flags(corpus), "--train-iters", "100", "--prefetch-microbatches", str(depth)]
    with Ranks(flags, script=UNREADABLE) as run:
        (ended,) = run.wait()
    assert ended.exit_code == 1
    assert "iteration        2/" in ended.stdout  # samples 0 to 7
    assert "iteration        3/" not in ended.stdout
    assert "in read_or_fail" in ended.stderr
    *_, raised, where = ended.stderr.splitlines()
    assert raised == "RuntimeError: the disk is gone"
    assert where.startswith("error on rank 0: it failed in the end of iteration 2")
