"""The length of a training run in steps, and the samples that it may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.config import Config, SampleLengths, TrainingConfig, accumulation_steps, sample_lengths
from megatron.core.course import Counts, Course

if TYPE_CHECKING:  # it comes with DeepSpeed, which tools need not wait for
    from megatron.checkpointing.train_state import TrainState


@dataclass(frozen=True)
class Lengths:
    """The length of a training run, in steps and samples.

    `ends_by` is the flag that ends the run at iteration `iterations`, with the flag's value. `course` are the counts of
    the whole run: those so far, continued through the phases to come.
    """

    samples: SampleLengths
    num_microbatches: int
    iterations: int
    ends_by: str
    course: Course

    @classmethod
    def of(cls, config: Config, world_size: int, state: TrainState) -> Lengths:
        """Plan the steps left in the budgets after `state`, the counts so far; the first budget spent ends the run.

        A budget is never exceeded: samples that do not fill a global batch are left over.
        """
        training, samples = config.training, sample_lengths(config, world_size)
        ahead = samples.ahead(state.counts, state.data_samples)
        iterations, ends_by = _end(training, state.counts, ahead)
        course = Course((*state.course.corners, *ahead.corners[1:]), ahead.step)
        return cls(samples, accumulation_steps(config, world_size), iterations, ends_by, course)

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.samples.global_batch_size

    def phases_left(self, state: TrainState) -> list[tuple[int, int]]:
        """Return (tokens of a sequence, steps) of each phase that is left after `state`, in order."""
        return self.samples.steps_from(state.data_samples, self.iterations - state.iteration)

    def left(self, state: TrainState) -> str:
        """Describe the steps left after `state`."""
        steps = self.iterations - state.iteration
        iterations = f"{steps} iteration{'s' * (steps != 1)}"
        samples = f"{self.global_batch_size} sample{'s' * (self.global_batch_size != 1)}"
        left = f"{self.ends_by} leaves {iterations} of {samples}"
        if not state.iteration:
            return left
        return (
            f"{left}; consumed so far: {state.iteration} iterations, {state.consumed_samples} samples, "
            f"{state.consumed_tokens} tokens"
        )

    def unreached(self, state: TrainState) -> list[int]:
        """Return the lengths of the phases that begin after the last step."""
        last = state.data_samples + (self.iterations - state.iteration) * self.global_batch_size - 1
        return [length for _, length in self.samples.after(last)] if last >= state.data_samples else []

    def num_samples(self, config: Config, state: TrainState) -> tuple[int, int, int]:
        """Return the most samples that training, validation and test can read; training includes future rollbacks.

        Training samples count from the start of the data. Every evaluation reads the same samples.
        """
        checkpoint = config.checkpoint
        rollbacks = max((checkpoint.rollback_on_loss_spike or 0) - state.rollbacks, 0)
        steps = self.iterations - state.iteration + rollbacks * (checkpoint.save_interval or 0)
        evaluated = config.training.eval_iters * self.global_batch_size
        return state.data_samples + steps * self.global_batch_size, evaluated, evaluated


def phases_of_run(config: Config, world_size: int) -> list[tuple[int, int]]:
    """Return (tokens of a sequence, steps) of each phase of a whole run, in order."""
    samples, start = sample_lengths(config, world_size), (0, 0, 0)
    iterations, _ = _end(config.training, start, samples.ahead(start, 0))
    return samples.steps_from(0, iterations)


def _end(training: TrainingConfig, counts: Counts, ahead: Course) -> tuple[int, str]:
    """Return the iteration with which the first budget is spent from these counts on, and that budget's flag."""
    iteration, samples, tokens = counts
    budgets = (
        ("--train-iters", training.train_iters, iteration, 1),
        ("--train-samples", training.train_samples, samples, ahead.step[1]),
    )
    ends = [
        (iteration + max(budget - consumed, 0) // per_step, f"{flag} ({budget})")
        for flag, budget, consumed, per_step in budgets
        if budget is not None
    ]
    if training.train_tokens is not None:
        last = ahead.last_iteration(max(training.train_tokens, tokens))
        ends.append((last, f"--train-tokens ({training.train_tokens})"))
    return min(ends)
