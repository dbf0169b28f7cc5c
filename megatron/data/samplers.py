"""Assignment of samples to ranks: a stateless function of the samples consumed so far.

A step takes samples consumed + k for k in [0, global batch size), where the global batch size is micro_batch_size *
data_parallel_size * num_microbatches. Microbatch m of data-parallel rank d takes

    k in [(m * data_parallel_size + d) * micro_batch_size, ... + micro_batch_size)

so the batch is the same set of samples for every layout with the same global batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSampler:
    """One data-parallel rank's share of every global batch. All ranks of a sequence-parallel group share one share."""

    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    num_microbatches: int

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self.micro_batch_size * self.data_parallel_size * self.num_microbatches

    def microbatch(self, consumed_samples: int, microbatch: int) -> range:
        """Return the samples of one microbatch of the step that starts after `consumed_samples` samples."""
        if not 0 <= microbatch < self.num_microbatches:
            raise IndexError(f"microbatch {microbatch} of a step that has {self.num_microbatches}")
        block = microbatch * self.data_parallel_size + self.data_parallel_rank
        first = consumed_samples + block * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def step(self, consumed_samples: int) -> list[range]:
        """Return the samples of every microbatch of the step."""
        return [self.microbatch(consumed_samples, m) for m in range(self.num_microbatches)]

    def microbatches(self, consumed_samples: int, num_samples: int) -> Iterator[list[int]]:
        """Yield this rank's microbatches, step by step, until less than a global batch of `num_samples` is left."""
        for consumed in range(consumed_samples, num_samples - self.global_batch_size + 1, self.global_batch_size):
            for indices in self.step(consumed):
                yield list(indices)
