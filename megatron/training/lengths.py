"""The length of a training run in steps, and the samples that it may read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, SampleLengths, accumulation_steps, sample_lengths
from megatron.core.course import Counts, Course


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
        corners, step = _phases_ahead(samples, state)
        budgets = (
            ("--train-iters", training.train_iters, state.iteration, 1),
            ("--train-samples", training.train_samples, state.consumed_samples, samples.global_batch_size),
        )
        ends = [
            (state.iteration + max(budget - consumed, 0) // per_step, f"{flag} ({budget})")
            for flag, budget, consumed, per_step in budgets
            if budget is not None
        ]
        if training.train_tokens is not None:
            ahead = Course((state.counts, *corners), step)
            last = ahead.last_iteration(max(training.train_tokens, state.consumed_tokens))
            ends.append((last, f"--train-tokens ({training.train_tokens})"))
        iterations, ends_by = min(ends)
        course = Course((*state.course.corners, *corners), step)
        return cls(samples, accumulation_steps(config, world_size), iterations, ends_by, course)

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.samples.global_batch_size

    def left(self, state: TrainState) -> str:
        """Describe the steps left after `state`."""
        steps = self.iterations - state.iteration
        iterations = "1 iteration" if steps == 1 else f"{steps} iterations"
        left = f"{self.ends_by} leaves {iterations} of {self.global_batch_size} samples"
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


def _phases_ahead(samples: SampleLengths, state: TrainState) -> tuple[list[Counts], Counts]:
    """Return (the counts at which each phase to come begins, the counts of a step after the last)."""
    batch, corners, counts, position = samples.global_batch_size, list[Counts](), state.counts, state.data_samples
    step = (1, batch, batch * state.seq_length)
    for first, length in samples.after(position):
        steps, position = (first - position) // batch, first
        counts = (counts[0] + steps, counts[1] + steps * step[1], counts[2] + steps * step[2])
        corners.append(counts)
        step = (1, batch, batch * length)
    return corners, step
