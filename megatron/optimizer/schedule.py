"""Learning-rate schedules: a pure function of the progress of training.

    warm-up   rises linearly from `warmup_initial` to `peak`
    decay     falls from `peak` to `minimum`, in the shape of the style
    after     stays at `minimum` (a constant schedule stays at `peak`)

    style                  fraction of (peak - minimum) left at r = (progress - warmup) / (decay - warmup)
    constant               1
    linear                 1 - r
    cosine                 (1 + cos(pi r)) / 2
    inverse-square-root    the rate itself is peak * sqrt(warmup / progress), never below the minimum; a warm-up shorter
                           than the first step, or none, counts as that step: peak / sqrt(iteration)
    WSD                    1 until the last `wsd_decay` of the decay length, then `wsd_style` over r of that part:
                           linear, cosine, exponential (2 * 0.5^r - 1) or minus_sqrt (1 - sqrt(r))

Lengths may be given in iterations, samples or tokens. They are all converted to one unit when the schedule is built,
along the course of the run, so that a length that has already passed does not move when the batch changes. The rates
do not depend on the unit: with constant batch and sequence length, every iteration has the same rate in any unit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron.config.errors import ConfigError
from megatron.config.optimizer import OptimizerConfig
from megatron.config.training import TrainingConfig
from megatron.core.course import UNITS, Course

STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")

_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}
WSD_STYLES = tuple(_SHAPES)


class ScheduleError(ConfigError):
    """A learning-rate schedule that cannot be honored."""


@dataclass(frozen=True)
class LearningRateSchedule:
    """A learning-rate schedule with every length in `unit` ("iters", "samples" or "tokens").

    `first_step` is the progress after the first step.

    Raises:
        ScheduleError: the values contradict each other.
    """

    peak: float
    minimum: float
    warmup: float
    decay: float
    style: str
    unit: str
    warmup_initial: float = 0.0
    wsd_decay: float = 0.0
    wsd_style: str = "exponential"
    first_step: float = 1.0

    def __post_init__(self) -> None:
        _require_one_of("--lr-decay-style", self.style, STYLES)
        _require_one_of("--lr-wsd-decay-style", self.wsd_style, WSD_STYLES)
        _require_one_of("the unit of the learning-rate schedule", self.unit, UNITS)
        if not 0.0 <= self.minimum <= self.peak:
            raise ScheduleError(
                f"--min-lr ({self.minimum:g}) must lie between 0 and --lr ({self.peak:g}); lower --min-lr "
                "or raise --lr."
            )
        if not 0.0 <= self.warmup_initial <= self.peak:
            raise ScheduleError(
                f"--lr-warmup-init ({self.warmup_initial:g}) must lie between 0 and --lr ({self.peak:g}); "
                "warm-up rises to --lr."
            )
        if not 0 <= self.warmup <= self.decay:
            raise ScheduleError(
                f"The learning-rate warm-up ({self.warmup:g} {self.unit}) must not be longer than the decay "
                f"({self.decay:g} {self.unit}), which includes it; shorten the warm-up or raise --lr-decay-{self.unit}."
            )
        if self.style == "WSD" and not 0 < self.wsd_decay <= self.decay - self.warmup:
            raise ScheduleError(
                f"--lr-wsd-decay-{self.unit} ({self.wsd_decay:g}) must lie between 1 and {self.decay - self.warmup:g}, "
                f"the {self.unit} that warm-up leaves of the decay length; give the length of the final decay."
            )

    def at(self, iteration: int, samples: int, tokens: int) -> float:
        """Return the learning rate of the step that brings the counts to `iteration`, `samples` and `tokens`.

        The counts include the step itself: the first step of a warm-up has a rate above zero, and the last step of the
        decay has the minimum (inverse-square-root has its formula's rate up to there).
        """
        return self.at_progress({"iters": iteration, "samples": samples, "tokens": tokens}[self.unit])

    def at_progress(self, progress: float) -> float:
        """Return the learning rate at a progress in `unit`."""
        if progress < self.warmup:
            return self.warmup_initial + (self.peak - self.warmup_initial) * progress / self.warmup
        if self.style == "constant" or progress <= self.warmup:
            return self.peak
        if progress > self.decay:
            return self.minimum
        if self.style == "inverse-square-root":
            first = max(self.warmup, self.first_step)
            return max(self.minimum, self.peak * math.sqrt(first / max(progress, self.first_step)))
        return self.minimum + (self.peak - self.minimum) * self._share(progress)

    def _share(self, progress: float) -> float:
        """Return the fraction of (peak - minimum) that the decay leaves at `progress`."""
        if self.style != "WSD":
            return _SHAPES[self.style]((progress - self.warmup) / (self.decay - self.warmup))
        start = self.decay - self.wsd_decay
        return 1.0 if progress <= start else _SHAPES[self.wsd_style]((progress - start) / self.wsd_decay)

    @classmethod
    def from_config(
        cls, optimizer_config: OptimizerConfig, training_config: TrainingConfig, course: Course
    ) -> "LearningRateSchedule":
        """Build the schedule that the `lr_*` and `train_*` settings describe, for a run of this course.

        The unit is that of --lr-decay-*, or of the --train-* that ends the run where no decay length is given: then
        decay ends with training.

        Raises:
            ScheduleError: lengths are missing, given twice, or contradict each other.
        """
        decay, unit = _given_length(optimizer_config, "lr_decay") or _end_of_training(training_config, course)

        def in_unit(given: tuple[float, str] | None) -> float:
            return 0.0 if given is None else course.convert(*given, unit)

        warmup = in_unit(_given_length(optimizer_config, "lr_warmup"))
        fraction = optimizer_config.lr_warmup_fraction
        if fraction is not None:
            _require_warmup_fraction(fraction, warmup)
            warmup = fraction * decay
        return cls(
            peak=optimizer_config.lr,
            minimum=optimizer_config.min_lr,
            warmup=warmup,
            decay=decay,
            style=optimizer_config.lr_decay_style,
            unit=unit,
            warmup_initial=optimizer_config.lr_warmup_init,
            wsd_decay=_final_decay(_given_length(optimizer_config, "lr_wsd_decay"), decay, unit, course),
            wsd_style=optimizer_config.lr_wsd_decay_style,
            first_step=course.convert(1, "iters", unit),
        )


def _end_of_training(training: TrainingConfig, course: Course) -> tuple[float, str]:
    """Return (length, unit) of the training length that is reached first."""
    budgets = _given_lengths(training, "train")
    if not budgets:
        raise ScheduleError(
            "The length of training is missing; give at least one of --train-iters, --train-samples and --train-tokens."
        )
    return min(budgets, key=lambda budget: course.convert(budget[0], budget[1], "tokens"))


def _final_decay(given: tuple[float, str] | None, decay: float, unit: str, course: Course) -> float:
    """Return the length in `unit` of the final decay that ends at `decay`."""
    if given is None:
        return 0.0
    length, own_unit = given
    return decay - course.convert(course.convert(decay, unit, own_unit) - length, own_unit, unit)


def _given_lengths(settings: OptimizerConfig | TrainingConfig, name: str) -> list[tuple[float, str]]:
    """Return (length, unit) of each setting among name_iters, name_samples and name_tokens that is given."""
    return [(getattr(settings, f"{name}_{unit}"), unit) for unit in UNITS if getattr(settings, f"{name}_{unit}")]


def _given_length(settings: OptimizerConfig, name: str) -> tuple[float, str] | None:
    """Return (length, unit) of the one setting among name_iters, name_samples and name_tokens that is given."""
    given = _given_lengths(settings, name)
    if len(given) > 1:
        flag = "--" + name.replace("_", "-")
        flags = " and ".join(f"{flag}-{unit} ({length})" for length, unit in given)
        raise ScheduleError(f"{flags} are both given, and only one of them can apply; remove the others.")
    return given[0] if given else None


def _require_warmup_fraction(fraction: float, warmup: float) -> None:
    if not 0.0 <= fraction <= 1.0:
        raise ScheduleError(
            f"--lr-warmup-fraction ({fraction:g}) must lie between 0 and 1: it is the share of the decay length that "
            "warm-up takes. Use --lr-warmup-iters for a number of iterations."
        )
    if warmup:
        raise ScheduleError(
            f"--lr-warmup-fraction ({fraction:g}) and a warm-up length ({warmup:g}) are both given, and only one of "
            "them can apply; remove one."
        )


def _require_one_of(what: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ScheduleError(f"{what} ({got!r}) is unknown; use one of {', '.join(allowed)}.")
