import io
import re

import pytest

from megatron.logging.progress import Heartbeat, NoProgress, ProgressBar, StepWork, build_progress, format_duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_heartbeat_says_where_the_step_is_and_how_long_it_will_take():
    stream, clock = io.StringIO(), Clock()
    progress = Heartbeat(stream, heartbeat_seconds=60, clock=clock)
    progress.start_step(7, StepWork(4))
    progress.advance("forward", layer=0, chunk=0)
    clock.now += 90
    progress.advance("backward", layer=3, chunk=2)
    assert stream.getvalue() == (
        " iteration 7 in progress: 25% | backward layer 3 chunk 2 | elapsed: 1:30 | left: 4:30 |\n"
    )


def test_the_time_left_weighs_chunks_by_their_work():
    """Chunks of a causal sequence: each takes as long as it has keys, and twice that backward."""
    stream, clock = io.StringIO(), Clock()
    progress = Heartbeat(stream, heartbeat_seconds=1, clock=clock)
    forward, layers = [60.0 * n for n in range(1, 9)], 2
    work = StepWork(3 * layers * sum(forward), forward, [2 * each for each in forward])
    progress.start_step(1, work)
    for phase, order, factor in (("forward", range(8), 1), ("backward", range(7, -1, -1), 2)):
        for layer in range(layers):
            for chunk in order:
                progress.advance(phase, layer, chunk)
                clock.now += factor * forward[chunk]
    minutes = [tuple(map(_minutes, re.findall(r"(?:elapsed|left): ([\d:]+)", line))) for line in _lines(stream)]
    assert len(minutes) == 31  # all but the first
    assert {elapsed + left for elapsed, left in minutes} == {3 * layers * 36}


def _lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def _minutes(text: str) -> int:
    hours, minutes, _ = map(int, f"0:{text}".split(":")[-3:])
    return 60 * hours + minutes


def test_heartbeats_keep_their_distance():
    stream, clock = io.StringIO(), Clock()
    progress = Heartbeat(stream, heartbeat_seconds=60, clock=clock)
    progress.start_step(1, StepWork(300))
    for chunk in range(300):
        clock.now += 1
        progress.advance("forward", 0, chunk)
    progress.finish_step()
    assert stream.getvalue().count("\n") == 5


def test_the_first_heartbeat_of_a_run_comes_soon():
    stream, clock = io.StringIO(), Clock()
    progress = Heartbeat(stream, heartbeat_seconds=60, clock=clock)
    for seconds, count in ((10, 1), (59, 1), (60, 2), (1e4, 3)):
        progress.start_step(1, StepWork(2))
        clock.now += seconds
        progress.advance("forward", 0, 0)
        assert stream.getvalue().count("\n") == count
        progress.finish_step()


def test_short_steps_have_no_heartbeat():
    stream, clock = io.StringIO(), Clock()
    progress = Heartbeat(stream, heartbeat_seconds=60, clock=clock)
    for iteration in range(100):
        progress.start_step(iteration, StepWork(1))
        progress.advance("forward", 0, 0)
        clock.now += 50
        progress.finish_step()
    assert stream.getvalue() == ""


def test_the_bar_moves_and_is_gone_after_the_step():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(stream, clock)
    bar.start_step(3, StepWork(2))
    bar.advance("forward", 0, 0)
    clock.now += 5
    bar.advance("backward", 0, 0)
    assert "iteration 3 [############------------]  50% | backward layer 0 chunk 0 | 0:05 < 0:05" in stream.getvalue()
    bar.finish_step()
    assert stream.getvalue().endswith("\r\x1b[2K")
    assert "\n" not in stream.getvalue()


def test_more_work_than_announced_stays_at_the_end():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(stream, clock)
    bar.start_step(1, StepWork(1))
    for chunk in range(3):
        clock.now += 1
        bar.advance("forward", 0, chunk)
    assert "100%" in stream.getvalue()
    assert "-" not in stream.getvalue().split("[")[-1].split("]")[0]


@pytest.mark.parametrize(
    "style, rank, stream, kind",
    [
        ("auto", 0, Terminal(), ProgressBar),
        ("auto", 0, io.StringIO(), Heartbeat),
        ("bar", 0, io.StringIO(), ProgressBar),
        ("line", 0, Terminal(), Heartbeat),
        ("off", 0, Terminal(), NoProgress),
        ("bar", 1, Terminal(), NoProgress),
    ],
)
def test_the_style_the_terminal_and_the_rank_decide(style, rank, stream, kind):
    assert type(build_progress(style, rank, stream, heartbeat_seconds=60)) is kind


def test_no_progress_takes_every_call():
    progress = NoProgress()
    progress.start_step(1, StepWork(2))
    progress.advance("forward", 0, 0)
    progress.finish_step()


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05"), (183_900, "2d 3h")]
)
def test_durations_read_as_a_clock(seconds, text):
    assert format_duration(seconds) == text
