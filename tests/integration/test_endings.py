"""How long a run is, why it stops early, and what it says on the way."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY
from tests.integration.corpus import copy_corpus
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
        run.wait_for("iteration        2/")
        run.processes[1].send_signal(signal.SIGTERM)
        first, second = run.wait()
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    iteration = saved_state(saved)["iteration"]
    assert f"exiting at iteration {iteration}" in first.stdout
    resumed = train([*flags, "--train-iters", str(iteration + 1), "--load", str(saved)], tmp_path / "events", 2)
    assert list(resumed.losses) == [iteration + 1]


def test_exit_duration_stops_saves_and_exits_with_zero(corpus: Path, tmp_path: Path) -> None:
    flags = [*ENDLESS, "--exit-duration-in-mins", "1", "--save", str(tmp_path / "saved")]
    run = train([*base_flags(corpus), *flags], tmp_path / "events", script=HURRIED)
    iteration = saved_state(tmp_path / "saved")["iteration"]
    assert f"exiting at iteration {iteration}" in run.output
    assert len(run.losses) == iteration


def test_time_saves_and_evaluates_as_rank_0_s_clock_says_and_the_run_resumes(corpus: Path, tmp_path: Path) -> None:
    saved, minutes = (
        tmp_path / "saved",
        ["--save-interval-mins", "0.5", "--eval-interval-mins", "1", "--eval-iters", "1"],
    )
    flags = [*base_flags(corpus), *OFFLOADED, *ranks(2, 3), "--save", str(saved), *minutes]
    run = train([*flags, "--train-iters", "8"], tmp_path / "events", 2, script=HURRIED)
    checkpoints = sorted(int(path.name.removeprefix("global_step")) for path in saved.glob("global_step*"))
    assert len(checkpoints) > 2
    assert checkpoints[-1] == 8
    assert len(run.validation_losses) > 1
    resume = ["--train-iters", "8", "--load", str(saved), "--ckpt-step", str(checkpoints[-2])]
    resumed = train([*flags, *resume], tmp_path / "resumed_events", 2)
    assert resumed.losses == {each: loss for each, loss in run.losses.items() if each > checkpoints[-2]}


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
    assert "peak GPU memory" not in line
    assert "n/a" not in line


def test_ranks_that_differ_do_not_start(corpus: Path) -> None:
    other = copy_corpus(corpus, corpus.with_name("other"))
    data = bytearray(Path(f"{other}.bin").read_bytes())
    data[100] ^= 1
    Path(f"{other}.bin").write_bytes(data)
    with Ranks([*base_flags(corpus), *ENDLESS], num_ranks=2, last_rank=["--data-path", str(other), "--lr", "1"]) as run:
        first, second = run.wait()
    assert (first.exit_code, second.exit_code) == (2, 2)
    fault = "--lr is 0.003 on rank 0 and 1.0 on rank 1 (and 1 more differ: the content of --data-path, its .bin,); "
    for ended, speaker in ((first, "error"), (second, "error on rank 1")):
        (line,) = (line for line in ended.stderr.splitlines() if "error" in line)
        assert line.startswith(f"{speaker}: {fault}")
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("interrupted", [[0, 1], [1]])
def test_ctrl_c_is_one_line_and_an_exit_code_of_its_own(corpus: Path, interrupted: list[int]) -> None:
    with Ranks([*base_flags(corpus), *OFFLOADED, *ranks(2, 3), *ENDLESS], num_ranks=2) as run:
        run.wait_for("iteration        2/")
        for rank in interrupted:
            run.processes[rank].send_signal(signal.SIGINT)
        ended = run.wait()
    assert [each.exit_code for each in ended] == [130, 130]
    said = "".join(each.stderr for each in ended)
    assert len(re.findall(r"^interrupted( on rank 1)?$", said, re.MULTILINE)) == 1, said
    assert "Traceback" not in said
    assert "error" not in said
