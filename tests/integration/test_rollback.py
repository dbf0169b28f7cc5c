"""A loss that spikes or is not finite: back to the last checkpoint, and on as if the data since were not there."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.launch.program import NOT_FINITE_EXIT_CODE
from megatron.logging.run_history import read_run
from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import OFFLOADED, PLAIN, SEQ_LENGTH, Ranks, Run, base_flags, ranks, read_tensors, train

SCRIPT = REPOSITORY / "tests/integration/bad_samples.py"
WATCHED = ["--save-interval", "4", "--loss-spike-factor", "2", "--rollback-on-loss-spike", "2"]
LAST = 20
# Of steps of four samples the 14th has number 52; the checkpoint before it is that of iteration 12.
BAD, LEFT_OUT = "52 53", "48 56"


def state_of(folder: Path, iteration: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"global_step{iteration}/train_state.json").read_text()))


@pytest.mark.parametrize(
    "execution, layout, weight",
    [
        (OFFLOADED, ranks(2, 3), "9"),
        (PLAIN, ranks(1, 0), "nan"),
        (PLAIN, ranks(1, 1), "9"),
        (OFFLOADED, ranks(2, 2), "nan"),
    ],
    ids=["fpdt-spike", "plain-nan", "plain-spike", "fpdt-nan"],
)
def test_a_run_that_went_back_equals_one_without_the_data(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, execution: list[str], layout: list[str], weight: str
) -> None:
    flags = [*base_flags(corpus), *execution, *layout, *WATCHED, "--train-iters", str(LAST)]
    back, without, resumed = (tmp_path / name for name in ("back", "without", "resumed"))

    def run(folder: Path, *more: str) -> Run:
        return train([*flags, "--save", str(folder), *more], folder / "events", 2, SCRIPT)

    monkeypatch.setenv("LEFT_OUT", LEFT_OUT)
    straight = run(without)
    monkeypatch.delenv("LEFT_OUT")
    monkeypatch.setenv("BAD_SAMPLES", BAD)
    monkeypatch.setenv("WEIGHT", weight)
    went_back = run(back)
    said = r"iteration 14 .*; going back to iteration 12 and on without samples 48 to 55 \(rollback 1 of 2\)"
    assert len(re.findall(said, went_back.output)) == 2  # once per rank
    assert (went_back.losses, went_back.grad_norms) == (straight.losses, straight.grad_norms)
    assert read_run(back / "events").train("loss") == straight.losses
    run(resumed, "--load", str(back), "--ckpt-step", "16")
    expected = read_tensors(without / f"global_step{LAST}")
    for folder in (back, resumed):
        tensors = read_tensors(folder / f"global_step{LAST}")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        counted = state_of(without, LAST) | {"data_samples": 4 * LAST + 8, "left_out_samples": 8, "rollbacks": 1}
        assert state_of(folder, LAST) == counted


def test_a_log_line_counts_every_iteration_once_after_a_rollback(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of iteration 13 is written before and after the rollback to 12; both count iterations 1 to 13."""
    flags = [*base_flags(corpus), *WATCHED, "--train-iters", str(LAST), "--log-interval", "13"]
    monkeypatch.setenv("LEFT_OUT", LEFT_OUT)
    straight = train([*flags, "--save", str(tmp_path / "without")], tmp_path / "straight", script=SCRIPT)
    monkeypatch.delenv("LEFT_OUT")
    monkeypatch.setenv("BAD_SAMPLES", BAD)
    monkeypatch.setenv("WEIGHT", "9")
    went_back = train([*flags, "--save", str(tmp_path / "back")], tmp_path / "events", script=SCRIPT)
    assert "iteration 14 " in went_back.output
    assert went_back.losses.keys() == {13, LAST}
    assert went_back.losses == straight.losses


@pytest.mark.parametrize(
    "bad, said",
    [
        ("52 53 60 61 68 69", "the loss of iteration 14 is .*; the run has gone back 2 times, which is all that "),
        ("4 5", r"iteration 2 \(samples 4 to 7\): the loss .*; --save .* has no checkpoint of this run to go back to"),
    ],
    ids=["too often", "too early"],
)
def test_a_run_that_cannot_go_back_ends(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, said: str
) -> None:
    monkeypatch.setenv("BAD_SAMPLES", bad)
    monkeypatch.setenv("WEIGHT", "nan" if bad == "4 5" else "9")
    saving = [*WATCHED, "--save", str(tmp_path), "--train-iters", str(LAST)]
    with Ranks([*base_flags(corpus), *saving], num_ranks=2, script=SCRIPT) as run:
        ended = run.wait()
    assert [rank.exit_code for rank in ended] == [NOT_FINITE_EXIT_CODE] * 2, ended
    assert re.search(f"^error: {said}", ended[0].stderr, re.MULTILINE), ended[0].stderr


def test_a_run_goes_back_to_before_a_change_of_batch(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further than a save interval, too, so that it takes more data than were foreseen."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = [*base_flags(corpus), *WATCHED, "--train-samples", "60"]
    train([*flags, "--exit-interval", "12", "--save", str(first)], first / "events")
    shutil.copytree(first / "global_step4", second / "global_step4")
    (second / "latest").write_text("global_step4")
    monkeypatch.setenv("BAD_SAMPLES", "50 51")
    monkeypatch.setenv("WEIGHT", "nan")
    smaller = ["--global-batch-size", "2", "--load", str(first), "--save", str(second)]
    run = train([*flags, *smaller], second / "events", script=SCRIPT)
    assert "going back to iteration 4 and on without samples 16 to 51" in run.output
    assert read_run(second / "events").train("consumed_tokens")[26] == 60 * SEQ_LENGTH
    counted = {"iteration": 26, "consumed_samples": 60, "data_samples": 96, "left_out_samples": 36}
    assert state_of(second, 26).items() >= (counted | {"changes": [[4, 16, 16 * SEQ_LENGTH]]}).items()
