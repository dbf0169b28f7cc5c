"""How long a run is, why it stops early, and what it says on the way."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from megatron.watchdog import EXIT_CODE, LONGEST_INTERVAL_SECONDS
from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import OFFLOADED, SEQ_LENGTH, Ranks, base_flags, ranks, train

HURRIED = REPOSITORY / "tests/integration/hurried.py"
FIGURES = ("lm loss", "learning rate", "grad norm", "loss scale", "tokens/s/GPU", "model TFLOP/s", "MFU", "HFU")
ENDLESS = ["--train-iters", "100000"]


def saved_state(folder: Path) -> dict[str, int]:
    """Return the counters of the newest checkpoint."""
    tag = (folder / "latest").read_text()
    return dict(json.loads((folder / tag / "train_state.json").read_text()))


@pytest.mark.parametrize(
    "length", [["--train-samples", "12"], ["--train-tokens", str(12 * SEQ_LENGTH)]], ids=["samples", "tokens"]
)
def test_a_length_in_samples_or_tokens_gives_as_many_iterations(
    corpus: Path, tmp_path: Path, length: list[str]
) -> None:
    run = train([*base_flags(corpus), *length], tmp_path / "events")
    assert list(run.losses) == [1, 2, 3]
    assert re.search(r"iteration\s+3/\s+3 \| consumed samples:\s+12 \| consumed tokens:\s+768 \|", run.output)


def test_exit_interval_stops_at_a_multiple_and_saves_there(corpus: Path, tmp_path: Path) -> None:
    flags = [*ENDLESS, "--exit-interval", "3", "--save", str(tmp_path / "saved"), "--save-interval", "2"]
    run = train([*base_flags(corpus), *flags], tmp_path / "events")
    assert list(run.losses) == [1, 2, 3]
    assert "exiting at iteration 3" in run.output
    assert saved_state(tmp_path / "saved")["iteration"] == 3
    assert {path.name for path in (tmp_path / "saved").glob("global_step*")} == {"global_step2", "global_step3"}


def test_sigterm_to_any_rank_saves_exits_with_zero_and_can_be_resumed(corpus: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    flags = [*base_flags(corpus), *OFFLOADED, *ranks(2, 3), "--save", str(saved)]
    with Ranks([*flags, *ENDLESS], num_ranks=2) as run:
        log = run.wait_for("iteration        2/")
        run.terminate(rank=1)
        first, second = run.wait()
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    iteration = saved_state(saved)["iteration"]
    assert f"exiting at iteration {iteration}" in log + first.stdout
    resumed = train([*flags, "--train-iters", str(iteration + 1), "--load", str(saved)], tmp_path / "events", 2)
    assert list(resumed.losses) == [iteration + 1]


def test_exit_duration_stops_saves_and_exits_with_zero(corpus: Path, tmp_path: Path) -> None:
    flags = [*ENDLESS, "--exit-duration-in-mins", "1", "--save", str(tmp_path / "saved")]
    run = train([*base_flags(corpus), *flags], tmp_path / "events", script=HURRIED)
    iteration = saved_state(tmp_path / "saved")["iteration"]
    assert f"exiting at iteration {iteration}" in run.output
    assert len(run.losses) == iteration


def test_the_log_shows_evaluations_heartbeats_and_every_figure(corpus: Path, tmp_path: Path) -> None:
    evaluation = ["--eval-interval", "2", "--eval-iters", "1"]
    heartbeat = ["--progress", "line", "--heartbeat-seconds", "1e-6"]
    flags = [*OFFLOADED, *evaluation, *heartbeat, "--peak-tflops", "0.1", "--train-iters", "4"]
    log = train([*base_flags(corpus), *flags], tmp_path / "events").output
    assert re.findall(r"(validation|test) loss at iteration (\d+) \| lm loss value: \d\.\d{6}E\+00", log) == [
        ("validation", "2"),
        ("validation", "4"),
        ("test", "4"),
    ]
    assert re.search(r"iteration 1 in progress: \d+% \| forward layer \d chunk \d \| elapsed: ", log)
    assert re.search(r"iteration 4 in progress: \d+% \| backward layer \d chunk \d \| elapsed: ", log)
    (line,) = re.findall(r"^ iteration +4/ +4 \|.*$", log, re.MULTILINE)
    for column in FIGURES:
        assert re.search(rf"\| {column}: +\d", line), column
    assert re.search(r"\| host memory \(GiB\): +\d", line)
    assert "peak GPU memory (GiB): n/a" in line


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named_and_the_others_end(corpus: Path, tmp_path: Path, stopped: int) -> None:
    saved = tmp_path / "saved"
    flags = [*OFFLOADED, *ranks(2, 3), "--save", str(saved), "--save-interval", "1", *ENDLESS]
    with Ranks([*base_flags(corpus), *flags, "--distributed-timeout-minutes", "1"], num_ranks=2) as run:
        run.wait_for("iteration        2/")
        time.sleep(3 * LONGEST_INTERVAL_SECONDS)  # for each to have told where it is
        run.processes[stopped].send_signal(signal.SIGSTOP)
        other = run.processes[1 - stopped]
        _, error = other.communicate(timeout=200)
    assert other.returncode == EXIT_CODE, error
    place = r"(iteration \d+(, (forward|backward) layer \d chunk \d)?|the end of iteration \d+|saving iteration \d+)"
    # The store is on rank 0.
    named = [r"rank 0, or the launcher that started it,", rf"rank 1 \(last in {place}\)"][stopped]
    said = rf"error on rank {1 - stopped}: {named} no longer answers.*; this rank was in {place}"
    assert re.search(said, error, re.DOTALL), error
    assert saved_state(saved)["iteration"] >= 1


def test_a_rank_that_fails_says_where_it_was(corpus: Path, tmp_path: Path) -> None:
    with Ranks([*base_flags(corpus), *OFFLOADED, *ranks(2, 3), *ENDLESS], num_ranks=2) as run:
        run.wait_for("iteration        2/")
        run.processes[1].kill()
        stdout, stderr = run.processes[0].communicate(timeout=100)
    assert run.processes[0].returncode not in (0, None)
    assert re.search(r"rank 0 stopped in (iteration \d+|the end of iteration)", stdout), stderr
