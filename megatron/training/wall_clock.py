"""Logging, evaluation and saving by time: before each step, rank 0's clock decides for all ranks what follows it.

    due after a step    where the step, if it takes as long as the last one, ends
    log                 at the first step, and at LONG_STEP_SECONDS or more after it began; not with --log-interval
    evaluate            --eval-interval-mins or more after the last evaluation
    save                --save-interval-mins or more after the last checkpoint

A resumed run counts from its own start: it has just been saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.config import Config

LONG_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class Due:
    """What follows a step; the same on all ranks once they have agreed."""

    stop: bool = False
    log: bool = False
    evaluate: bool = False
    save: bool = False


class WallClock:
    """Says what is due by time on this rank."""

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self._logs_long_steps = config.logging.log_interval is None
        self._exit_seconds = _seconds(config.training.exit_duration_in_mins)
        self._evaluation_seconds = _seconds(config.training.eval_interval_mins)
        self._save_seconds = _seconds(config.checkpoint.save_interval_mins)
        self._clock = clock
        self._started = self._evaluated = self._saved = self._step_started = clock()
        self._step_seconds: float | None = None  # of the last step

    def start_step(self, stop: bool) -> Due:
        """Return what is due after the step that starts now; `stop` says whether a signal asks for the end."""
        now = self._step_started = self._clock()
        end = now + (self._step_seconds or 0.0)
        return Due(
            stop=stop or now - self._started >= self._exit_seconds,
            log=self._logs_long_steps and (self._step_seconds is None or self._step_seconds >= LONG_STEP_SECONDS),
            evaluate=end - self._evaluated >= self._evaluation_seconds,
            save=end - self._saved >= self._save_seconds,
        )

    def finish_step(self) -> None:
        """Take the time of the step, without the evaluation and the saving after it."""
        self._step_seconds = self._clock() - self._step_started

    def count_evaluation(self) -> None:
        """Count the time to the next evaluation from here."""
        self._evaluated = self._clock()

    def count_checkpoint(self) -> None:
        """Count the time to the next checkpoint from here."""
        self._saved = self._clock()


def _seconds(minutes: float | None) -> float:
    return float("inf") if minutes is None else minutes * 60
