"""Counters of a run: everything that training advances and a checkpoint stores, except tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.core.course import Course


@dataclass
class TrainState:
    """The progress of a run. `data_samples` is the position in the data of the current sequence length.

    It includes samples that a rollback skipped, which `left_out_samples` counts; they are not consumed. `changes` lists
    the iterations, samples and tokens consumed at each change of the global batch or the sequence length. A checkpoint
    older than `global_batch_size` and `changes` counts as a run with one global batch size, the mean.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    data_samples: int = 0
    seq_length: int = 0
    skipped_iterations: int = 0
    nan_iterations: int = 0
    left_out_samples: int = 0
    rollbacks: int = 0
    global_batch_size: int = 0
    changes: list[list[int]] = field(default_factory=list)

    def advance(self, samples: int, seq_length: int) -> None:
        """Count one step."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += samples * seq_length
        self.data_samples += samples

    def start(self, global_batch_size: int, seq_length: int) -> list[str]:
        """Continue with this batch and length; return the differences from before, one line each.

        If the length has changed, the data start at their first sample.
        """
        mean_batch = self.consumed_samples // self.iteration if self.iteration else 0
        batch_before, length_before = self.global_batch_size or mean_batch, self.seq_length
        differences = []
        if batch_before not in (0, global_batch_size):
            differences.append(
                f"the global batch ({global_batch_size} sequences) differs from the checkpoint's ({batch_before}): "
                "what is left of --train-iters, --train-samples or --train-tokens is taken in steps of the new size; "
                f"give --global-batch-size {batch_before} to keep the old one"
            )
        if length_before not in (0, seq_length):
            self.data_samples = 0
            differences.append(
                f"--seq-length ({seq_length}) differs from the checkpoint's ({length_before}): the data start again at "
                "their first sample"
            )
        if self.iteration and (self.global_batch_size, self.seq_length) != (global_batch_size, seq_length):
            self.changes.append([self.iteration, self.consumed_samples, self.consumed_tokens])
        self.global_batch_size, self.seq_length = global_batch_size, seq_length
        return differences

    @property
    def course(self) -> Course:
        """The counts of the run so far, continued at the current batch and length."""
        straight = Course.straight(self.global_batch_size, self.seq_length)
        changes = tuple((iterations, samples, tokens) for iterations, samples, tokens in self.changes)
        return Course((*straight.corners, *changes), straight.step)

    def leave_out_data_of(self, state: TrainState) -> None:
        """Continue from this older state, but skip the data that the run has read up to `state`."""
        self.left_out_samples += state.data_samples - self.data_samples
        self.data_samples = state.data_samples
        self.rollbacks = state.rollbacks + 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
