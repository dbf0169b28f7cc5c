"""Warnings of intervals that do not suit the planned step time: evaluations of hours, and days without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config import Config
from megatron.planner.plan import Plan
from megatron.planner.training import Training

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
USUAL_MINUTES = 60  # between checkpoints, in advice
USUAL_EVALUATION = 15 * MINUTE


def interval_warnings(config: Config, plan: Plan, training: Training) -> list[str]:
    """Return a line for an evaluation that takes too long, and for a day or more without a checkpoint.

    `plan` is that of steps of --seq-length, `training` that of the whole run.
    """
    return [*_evaluation(config, plan), *_unsaved(config, plan, training)]


def _evaluation(config: Config, plan: Plan) -> Iterator[str]:
    training, speed = config.training, plan.speed
    batch = speed.forward + speed.head / 3  # of the three products of the head one is forward
    seconds = training.eval_iters * batch
    between = _shortest(training.evaluation_interval, training.eval_interval_mins, speed.step)
    if seconds < HOUR and (seconds < MINUTE or seconds < between):
        return
    fewer = max(int(USUAL_EVALUATION / batch), 1)
    advice = f"use for example --eval-iters {fewer}" if fewer < training.eval_iters else "lengthen the interval"
    yield (
        f"by the plan an evaluation of --eval-iters ({training.eval_iters}) takes {duration(seconds)}, after every "
        f"{duration(between)} of training; {advice}"
    )


def _unsaved(config: Config, plan: Plan, training: Training) -> Iterator[str]:
    checkpoint, step = config.checkpoint, plan.speed.step
    between = whole = training.seconds
    if checkpoint.save is not None:
        between = min(whole, _shortest(checkpoint.save_interval, checkpoint.save_interval_mins, step))
    if between < DAY:
        return
    advice, iterations = f"--save-interval-mins {USUAL_MINUTES}", training.num_steps
    if checkpoint.save is None:
        yield (
            f"by the plan the {iterations} iterations take {duration(whole)}, and nothing is saved; add --save FOLDER "
            f"{advice}"
        )
    else:
        yield f"by the plan nothing is saved for {duration(between)}; add for example {advice}"


def _shortest(interval: int | None, minutes: float | None, step: float) -> float:
    """Return the seconds between two ends of an interval in iterations, in minutes, or both."""
    ends = [interval * step if interval else None, minutes * MINUTE if minutes else None]
    return min((end for end in ends if end is not None), default=float("inf"))


def duration(seconds: float) -> str:
    """Return seconds in the unit that a person would use."""
    for unit, size in (("days", DAY), ("hours", HOUR)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / MINUTE:.0f} minutes"
