"""How long a training is, and how much data it may come to read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import Config, accumulation_steps, global_batch_size


@dataclass(frozen=True)
class Lengths:
    """How long the training is, in steps and samples."""

    global_batch_size: int
    num_microbatches: int
    iterations: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> Lengths:
        """Derive them from the configuration's iterations, samples or tokens."""
        training, batch = config.training, global_batch_size(config, world_size)
        samples = training.train_samples or (training.train_tokens or 0) // config.model.seq_length
        return cls(batch, accumulation_steps(config, world_size), training.train_iters or samples // batch)

    def num_samples(self, config: Config, left_out: int) -> tuple[int, int, int]:
        """Samples that training, validation and test will take at most, beside those `left_out` so far."""
        training, checkpoint = config.training, config.checkpoint
        rolled_back = (checkpoint.rollback_on_loss_spike or 0) * (checkpoint.save_interval or 0)
        evaluations = self.iterations // training.eval_interval + 1
        per_evaluation = training.eval_iters * self.global_batch_size
        training_samples = left_out + (self.iterations + rolled_back) * self.global_batch_size
        return training_samples, evaluations * per_evaluation, per_evaluation
