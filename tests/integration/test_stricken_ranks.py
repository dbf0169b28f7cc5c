"""A rank that dies, hangs or fails at any time ends the run, and is named."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.ranks.watchdog import EXIT_CODE
from tests.distributed.launcher import REPOSITORY, free_port
from tests.integration.runs import OFFLOADED, Ranks, base_flags, ranks, train

STRICKEN = REPOSITORY / "tests/integration/stricken.py"
FLAGS = [*OFFLOADED, *ranks(2, 3), "--distributed-timeout-minutes", "0.12"]
ENDLESS = ["--train-iters", "100000"]
BAD_THIRD_STEP = {"BAD_SAMPLES": "8 9", "WEIGHT": "nan"}
ITERATION = r"iteration 2, backward layer \d chunk \d"
LEFT = "no longer answers"
STRIKES = {
    # Who is struck, how and where; who says so, and how.
    "1 SIGKILL joining": (0, r"rank\(s\) 1 of 2 did not join within 0.09 minutes"),
    "0 SIGSTOP choosing a checkpoint": (1, rf"rank 0 \(last in choosing a checkpoint\), or the launcher .* {LEFT}"),
    "1 SIGSTOP building the data index": (0, rf"rank 1 \(last in building the data index\) {LEFT}"),
    "1 SIGKILL building the model": (0, rf"rank 1 \(last in building the model\) {LEFT}"),
    "1 SIGKILL loading": (0, rf"rank 1 \(last in loading .*global_step2\) {LEFT}"),
    "0 SIGKILL iteration 2, b": (1, rf"rank 0 \(last in {ITERATION}\), or the launcher .* {LEFT}"),
    "1 SIGSTOP iteration 2, b": (0, rf"rank 1 \(last in {ITERATION}\) {LEFT}"),
    "1 SIGSTOP evaluating": (0, rf"rank 1 \(last in iteration 1\) {LEFT}"),
    "0 SIGSTOP saving": (1, rf"rank 0 \(last in saving iteration 2\), or the launcher .* {LEFT}"),
    "1 RuntimeError saving": (0, r"rank 1 \(last in saving iteration 2\) failed: RuntimeError: stricken"),
    "1 SIGKILL going back": (0, rf"rank 1 \(last in going back from iteration 3\) {LEFT}"),
}


@pytest.mark.parametrize("strike", STRIKES)
def test_a_rank_that_dies_hangs_or_fails_is_named_by_the_other(corpus: Path, tmp_path: Path, strike: str) -> None:
    speaker, said = STRIKES[strike]
    saving = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    rollback = ["--rollback-on-loss-spike", "1", "--loss-spike-factor", "2"]
    flags = [*base_flags(corpus), *FLAGS, *saving, *rollback]
    if "loading" in strike:
        train([*flags, "--train-iters", "2"], tmp_path / "events", 2)
    evaluation = ["--eval-interval", "1", "--eval-iters", "1"] if "evaluating" in strike else []
    with Ranks([*flags, *ENDLESS, *evaluation], 2, script=STRICKEN, STRIKE=strike, **BAD_THIRD_STEP) as run:
        other = run.end_of(speaker)
        if "Error" in strike:
            failed = run.end_of(1)
            assert failed.exit_code == 1
            assert "RuntimeError: stricken\nerror on rank 1: it failed in saving iteration 2, as above" in failed.stderr
    assert re.search(f"^error on rank {speaker}: {said}", other.stderr, re.MULTILINE), other
    assert "Traceback" not in other.stderr
    assert other.exit_code == (1 if "Error" in strike else EXIT_CODE), other


# It takes half a minute to kill a process that is stopped.
@pytest.mark.parametrize(
    "signal_name, exit_code",
    [pytest.param("SIGSTOP", EXIT_CODE, marks=pytest.mark.slow), ("SIGKILL", 256 - signal.SIGKILL)],
)
def test_the_deepspeed_launcher_passes_the_first_exit_code_on(
    corpus: Path, tmp_path: Path, signal_name: str, exit_code: int
) -> None:
    flags = [*base_flags(corpus), *FLAGS, *ENDLESS, "--distributed-timeout-minutes", "0.2"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STRIKE": f"1 {signal_name} iteration 2, b"}
    ended = subprocess.run(
        [*launcher, str(STRICKEN), *flags], env=environment, capture_output=True, text=True, timeout=200, cwd=REPOSITORY
    )
    assert ended.returncode == exit_code, ended.stderr
    assert re.search(rf"^error on rank 0: rank 1 \(last in {ITERATION}\) no longer answers", ended.stderr, re.MULTILINE)
