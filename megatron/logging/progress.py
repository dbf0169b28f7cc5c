"""Progress reports within a step: a step of a million tokens takes minutes, and a silent terminal looks like a hang.

On a terminal, a bar that is redrawn a few times a second; elsewhere an occasional line, so that logs stay short.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

_REDRAW_SECONDS = 0.1
_BAR_WIDTH = 24
_FIRST_HEARTBEAT_SECONDS = 10.0
_ERASE_LINE = "\r\x1b[2K"


@dataclass(frozen=True)
class StepWork:
    """The work of a step, and that of one chunk of a layer in a forward and in a backward pass; without them, 1."""

    total: float
    forward: Sequence[float] = ()
    backward: Sequence[float] = ()

    def of(self, phase: str, chunk: int) -> float:
        """Return the work of a chunk of a layer."""
        chunks = self.backward if phase == "backward" else self.forward
        return chunks[chunk] if chunks else 1.0


class StepProgress(Protocol):
    """Receives the training loop's reports on the current step."""

    def start_step(self, iteration: int, work: StepWork) -> None:
        """Begin a step."""

    def advance(self, phase: str, layer: int, chunk: int) -> None:
        """Report that one piece of work starts: `chunk` of `layer` in "forward", "recompute" or "backward"."""

    def finish_step(self) -> None:
        """End the step and leave the stream ready for ordinary lines."""


class NoProgress:
    """Reports nothing: for --progress off, and for every rank but the first."""

    def start_step(self, iteration: int, work: StepWork) -> None:
        pass

    def advance(self, phase: str, layer: int, chunk: int) -> None:
        pass

    def finish_step(self) -> None:
        pass


class _TimedProgress(ABC):
    """Sums up the work of the chunks and shows the progress every `interval` seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float], interval: float) -> None:
        self._stream = stream
        self._clock = clock
        self._interval = interval
        self._iteration = 0
        self._work = StepWork(1.0)
        self._done = self._in_progress = 0.0
        self._started = 0.0
        self._due = 0.0

    def start_step(self, iteration: int, work: StepWork) -> None:
        self._iteration = iteration
        self._work = work
        self._done = self._in_progress = 0.0
        self._started = self._clock()
        self._due = self._started + self._interval

    def advance(self, phase: str, layer: int, chunk: int) -> None:
        now = self._clock()
        self._done += self._in_progress
        self._in_progress = self._work.of(phase, chunk)
        if now >= self._due:
            self._due = now + self._interval
            self._stream.write(self._text(now - self._started, f"{phase} layer {layer} chunk {chunk}"))
            self._stream.flush()

    @abstractmethod
    def _text(self, elapsed: float, place: str) -> str: ...

    def _share_done(self) -> float:
        return min(self._done / self._work.total, 1.0)

    def _seconds_left(self, elapsed: float) -> str:
        share = self._share_done()
        return format_duration(elapsed * (1.0 - share) / share) if share > 0.0 else "?"


class ProgressBar(_TimedProgress):
    """A bar that is redrawn on one line of a terminal and erased when the step ends."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock, _REDRAW_SECONDS)

    def finish_step(self) -> None:
        self._stream.write(_ERASE_LINE)
        self._stream.flush()

    def _text(self, elapsed: float, place: str) -> str:
        share = self._share_done()
        bar = ("#" * round(share * _BAR_WIDTH)).ljust(_BAR_WIDTH, "-")
        times = f"{format_duration(elapsed)} < {self._seconds_left(elapsed)}"
        return f"{_ERASE_LINE} iteration {self._iteration} [{bar}] {share:4.0%} | {place} | {times}"


class Heartbeat(_TimedProgress):
    """A line at most every `heartbeat_seconds` during a step; in the first step of a run the first comes sooner."""

    def __init__(
        self, stream: TextIO, heartbeat_seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream, clock, heartbeat_seconds)
        self._first_seconds = _FIRST_HEARTBEAT_SECONDS

    def start_step(self, iteration: int, work: StepWork) -> None:
        super().start_step(iteration, work)
        self._due = min(self._due, self._started + self._first_seconds)
        self._first_seconds = self._interval

    def finish_step(self) -> None:
        pass

    def _text(self, elapsed: float, place: str) -> str:
        return (
            f" iteration {self._iteration} in progress: {self._share_done():.0%} | {place} | "
            f"elapsed: {format_duration(elapsed)} | left: {self._seconds_left(elapsed)} |\n"
        )


def build_progress(style: str, rank: int, stream: TextIO, heartbeat_seconds: float) -> StepProgress:
    """Return the progress report for --progress `style` (auto, bar, line or off), shown by rank 0 alone.

    `auto` is a bar if `stream` is a terminal and a heartbeat line if it is not.
    """
    if rank != 0 or style == "off":
        return NoProgress()
    if style == "bar" or (style == "auto" and stream.isatty()):
        return ProgressBar(stream)
    return Heartbeat(stream, heartbeat_seconds)


def format_duration(seconds: float) -> str:
    """Return m:ss, h:mm:ss for an hour or more, or days and hours for a day or more."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        days, hours = divmod(round(seconds / 3600), 24)
        return f"{days}d {hours}h"
    return f"{hours}:{minutes:02d}:{whole_seconds:02d}" if hours else f"{minutes}:{whole_seconds:02d}"
