"""A rank that dies, hangs or fails at any time ends the run, and is named."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from psutil import Process

from megatron.ranks.watchdog import EXIT_CODE
from tests.distributed.launcher import REPOSITORY, free_port
from tests.integration.runs import OFFLOADED, SCRIPT, Ranks, base_flags, ranks, train

STRICKEN = REPOSITORY / "tests/integration/stricken.py"
FLAGS = [*OFFLOADED, *ranks(2, 3), "--distributed-timeout-minutes", "0.12"]
ENDLESS = ["--train-iters", "100000"]
BAD_THIRD_STEP = {"BAD_SAMPLES": "8 9", "WEIGHT": "nan"}
ITERATION = r"iteration 2, backward layer \d chunk \d"
STEP = r"(iteration \d+(, (forward|backward) layer \d chunk \d)?|the end of iteration \d+)"
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
@pytest.mark.parametrize("signal_name", [pytest.param("SIGSTOP", marks=pytest.mark.slow), "SIGKILL"])
def test_the_deepspeed_launcher_ends_with_the_exit_code_for_a_lost_rank(
    corpus: Path, tmp_path: Path, signal_name: str
) -> None:
    flags = [*base_flags(corpus), *FLAGS, *ENDLESS, "--distributed-timeout-minutes", "0.2"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    log = tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [*launcher, str(SCRIPT), *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            cwd=REPOSITORY,
        )
    try:
        wait_for("iteration        2/", log)
        strike_largest_process(run.pid, 1, getattr(signal, signal_name))
        exit_code = run.wait(120)
    finally:
        run.terminate()
    said = log.read_text()
    assert exit_code == EXIT_CODE, said
    assert re.search(rf"^error on rank 0: rank 1 \(last in .*\) {LEFT}", said, re.MULTILINE), said
    by_itself = rf"^error on rank 1: it was killed by SIGKILL in {STEP}; the kernel's out-of-memory killer"
    assert bool(re.search(by_itself, said, re.MULTILINE)) == (signal_name == "SIGKILL"), said


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def strike_largest_process(launcher: int, rank: int, number: int) -> None:
    """Send a signal to the process of a rank that uses the most memory, as the kernel's out-of-memory killer does."""
    processes = Process(launcher).children(recursive=True)
    of_rank = [each for each in processes if each.environ().get("RANK") == str(rank)]
    max(of_rank, key=lambda each: each.memory_info().rss).send_signal(number)
