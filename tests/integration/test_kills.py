"""A run that is killed at a random moment of training or saving goes on as if it never had been.

Each case trains, saving after every iteration, has every rank killed with SIGKILL, starts again with the same flags,
and compares with a run that nobody disturbed: every loss of both parts, as TensorBoard's fp32 numbers, and every
tensor of the last checkpoint, bit for bit. All the cases: `make kill-test`.
"""

import random
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.integration.runs import OFFLOADED, PLAIN, Ranks, base_flags, ranks, read_events, read_tensors

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fresh processes, one per rank, start too slowly")

NUM_KILLS = 50
NUM_QUICK = 3
SEED = 20
ITERATIONS = 8
SAVING = ["--save-interval", "1", "--keep-last-n-checkpoints", "2"]
SETTINGS = ["--train-iters", str(ITERATIONS), "--hidden-dropout", "0.1", "--lr-decay-style", "cosine", *SAVING]


@dataclass(frozen=True)
class Layout:
    """How a run is spread and executed."""

    num_ranks: int
    flags: tuple[str, ...]


LAYOUTS = (
    Layout(1, (*PLAIN, *ranks(1, 0))),
    Layout(2, (*OFFLOADED, *ranks(2, 3))),
    Layout(1, (*OFFLOADED, *ranks(1, 2))),
)


@dataclass(frozen=True)
class Undisturbed:
    """What a run reports and leaves that nobody kills, and how long its start and a step with its save take."""

    losses: dict[int, float]
    checkpoint: Path
    start_seconds: float
    step_seconds: float


@pytest.fixture(scope="session")
def kill_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


def flags_of(layout: Layout, corpus: Path, folder: Path) -> list[str]:
    saved = str(folder / "saved")
    return [*base_flags(corpus), *SETTINGS, *layout.flags, "--save", saved, "--load", saved]


@cache
def undisturbed(layout: Layout, corpus: Path, kill_folder: Path) -> Undisturbed:
    """Run a layout once for all its cases."""
    folder = kill_folder / f"layout{LAYOUTS.index(layout)}"
    folder.mkdir()
    checkpoint = folder / "saved" / f"global_step{ITERATIONS}"
    flags = [*flags_of(layout, corpus, folder), "--tensorboard-dir", str(folder / "events")]
    moments = [time.monotonic()]
    with Ranks(flags, layout.num_ranks) as run:
        for text in (step_line(1), f"saved {checkpoint}"):
            run.wait_for(text)
            moments.append(time.monotonic())
        ended = run.wait()
    assert [rank.exit_code for rank in ended] == [0] * layout.num_ranks, ended
    start, steps = moments[1] - moments[0], moments[2] - moments[1]
    return Undisturbed(read_events(folder / "events")["train/loss"], checkpoint, start, steps / ITERATIONS)


def step_line(step: int) -> str:
    return f"iteration {step:8d}/"


@pytest.mark.parametrize(
    "number",
    [
        *range(NUM_QUICK),
        *(pytest.param(number, marks=pytest.mark.slow) for number in range(NUM_QUICK, NUM_KILLS)),
    ],
)
def test_a_killed_run_goes_on_as_if_it_never_had_been(
    corpus: Path, tmp_path: Path, kill_folder: Path, number: int
) -> None:
    layout = LAYOUTS[number % len(LAYOUTS)]
    expected = undisturbed(layout, corpus, kill_folder)
    flags = flags_of(layout, corpus, tmp_path)
    moment = random.Random(SEED + number)
    killed, resumed = ([*flags, "--tensorboard-dir", str(tmp_path / part)] for part in ("killed", "resumed"))
    with Ranks(killed, layout.num_ranks) as run:
        step = moment.randrange(ITERATIONS - 2)  # 0: before the first one
        if step:
            run.wait_for(step_line(step))
        # Two steps further the run is still alive, however much slower it was when it was timed.
        run.watch_for(step_line(step + 2), moment.uniform(0, expected.step_seconds if step else expected.start_seconds))
        run.kill(first=number % layout.num_ranks, pause_seconds=moment.uniform(0, 0.05))
        exit_codes = [process.poll() for process in run.processes]
    leftovers = [path.name for path in (tmp_path / "saved").glob("*.*") if path.suffix in (".tmp", ".old")]
    with Ranks(resumed, layout.num_ranks) as run:
        ended = run.wait()
    assert [rank.exit_code for rank in ended] == [0] * layout.num_ranks, ended
    before = read_events(tmp_path / "killed").get("train/loss", {})
    after = read_events(tmp_path / "resumed")["train/loss"]
    print(f"kill {number}: {exit_codes}, after step {max(before, default=0)}, going on at {min(after)}, {leftovers}")
    assert -signal.SIGKILL in exit_codes
    assert before.keys() | after.keys() == expected.losses.keys()
    assert before.items() <= expected.losses.items()
    assert after.items() <= expected.losses.items()
    assert_same_tensors(expected.checkpoint, tmp_path / "saved" / expected.checkpoint.name)


def assert_same_tensors(first: Path, second: Path) -> None:
    ours, theirs = read_tensors(first), read_tensors(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
