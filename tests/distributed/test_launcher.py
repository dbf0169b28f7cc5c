"""The launch helper: what the ranks are told, what is read from the log, and what a failure says."""

from pathlib import Path

import pytest

from tests.distributed.launcher import TrainingFailure, launch, read_log, run_training

LOG = """
 iteration        1/      20 | consumed samples:  8 | lm loss: 8.123456E+00 | loss scale: 1.0 | grad norm: 1.234 |
[rank0]:  iteration        2/      20 | consumed samples:           16 | lm loss: n/a | grad norm: n/a |
 iteration        3/      20 | lm loss: 7.500000E+00 | grad norm: inf |
 validation loss at iteration 3 | lm loss value: 7.250000E+00 | lm loss PPL: 1.408E+03 |
"""

SCRIPT = """
import os, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
assert os.environ["LOCAL_RANK"] == str(rank) and os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])
if sys.argv[1] == "fail" and rank == 1:
    sys.exit("error: rank 1 does not like its flags")
if sys.argv[1] == "hang":
    print("about to hang", flush=True)
    time.sleep(60)
if rank == world - 1:
    print(" iteration        1/       1 | lm loss: 2.500000E+00 | grad norm: 0.500 |")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "pretend_to_train.py"
    path.write_text(SCRIPT)
    return path


def test_losses_and_gradient_norms_are_read_by_iteration() -> None:
    run = read_log(LOG)
    assert run.losses == {1: 8.123456, 3: 7.5}
    assert run.grad_norms == {1: 1.234, 3: float("inf")}
    assert run.validation_losses == {3: 7.25}


def test_a_run_on_two_ranks_returns_the_log_of_whichever_rank_prints(script: Path) -> None:
    run = run_training(["train"], 2, script=script, timeout_seconds=60)
    assert run.losses == {1: 2.5}
    assert run.grad_norms == {1: 0.5}


def test_a_failing_rank_is_reported_with_its_words(script: Path) -> None:
    with pytest.raises(TrainingFailure, match=r"rank 1: exit code 1\nerror: rank 1 does not like its flags"):
        run_training(["fail"], 2, script=script, timeout_seconds=60)


def test_a_late_run_is_killed_and_keeps_its_output(script: Path) -> None:
    finished = launch(script, ["hang"], 2, timeout_seconds=2)
    assert finished.exit_codes == [None, None]
    assert finished.outputs == ["about to hang\n"] * 2
