"""The length of a training run in steps, and the samples that it may read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, accumulation_steps, global_batch_size


@dataclass(frozen=True)
class Lengths:
    """The length of a training run, in steps and samples.

    `ends_by` is the flag that ends the run at iteration `iterations`, with the flag's value.
    """

    global_batch_size: int
    num_microbatches: int
    iterations: int
    ends_by: str

    @classmethod
    def of(cls, config: Config, world_size: int, state: TrainState) -> Lengths:
        """Plan the steps left in the budgets after `state`, the counts so far; the first budget spent ends the run.

        A budget is never exceeded: samples that do not fill a global batch are left over.
        """
        training, batch = config.training, global_batch_size(config, world_size)
        budgets = (
            ("--train-iters", training.train_iters, state.iteration, 1),
            ("--train-samples", training.train_samples, state.consumed_samples, batch),
            ("--train-tokens", training.train_tokens, state.consumed_tokens, batch * config.model.seq_length),
        )
        steps, ends_by = min(
            (max(budget - consumed, 0) // per_step, f"{flag} ({budget})")
            for flag, budget, consumed, per_step in budgets
            if budget is not None
        )
        return cls(batch, accumulation_steps(config, world_size), state.iteration + steps, ends_by)

    def left(self, state: TrainState) -> str:
        """Describe the steps left after `state`."""
        steps = self.iterations - state.iteration
        iterations = "1 iteration" if steps == 1 else f"{steps} iterations"
        return (
            f"{self.ends_by} leaves {iterations} of {self.global_batch_size} samples; consumed so far: "
            f"{state.iteration} iterations, {state.consumed_samples} samples, {state.consumed_tokens} tokens"
        )

    def num_samples(self, config: Config, state: TrainState) -> tuple[int, int, int]:
        """Return the most samples that training, validation and test can read; training includes future rollbacks.

        Training samples count from the start of the data. Every evaluation reads the same samples.
        """
        checkpoint = config.checkpoint
        rollbacks = max((checkpoint.rollback_on_loss_spike or 0) - state.rollbacks, 0)
        steps = self.iterations - state.iteration + rollbacks * (checkpoint.save_interval or 0)
        evaluated = config.training.eval_iters * self.global_batch_size
        return state.data_samples + steps * self.global_batch_size, evaluated, evaluated
