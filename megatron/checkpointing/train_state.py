"""Counters of a run: everything that training advances and a checkpoint stores, except tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.checkpointing.errors import CheckpointError
from megatron.config import SampleLengths
from megatron.core.course import Counts, Course


@dataclass
class TrainState:
    """The progress of a run. `data_samples` is the position in the order of the samples.

    It includes samples that a rollback skipped, which `left_out_samples` counts; they are not consumed. `changes` lists
    the iterations, samples and tokens consumed at each change of the global batch or the sequence length. A checkpoint
    older than `global_batch_size` and `changes` counts as a run with one global batch size, the mean. The order of the
    samples follows from `phases` and `is_grouped` of `SampleLengths`; no phases: one length.
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
    phases: list[list[int]] = field(default_factory=list)
    is_grouped: bool = False

    def advance(self, samples: int, seq_length: int) -> None:
        """Count one step."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += samples * seq_length
        self.data_samples += samples

    def start(self, lengths: SampleLengths) -> list[str]:
        """Continue with this batch and these lengths; return the differences from before, one line each.

        Where the samples are cut in another way, the data start at their first sample, or in a schedule at the sample
        that follows those consumed. CheckpointError for another batch where steps may differ in length: which samples
        are in a phase or group follows from it.
        """
        mean_batch = self.consumed_samples // self.iteration if self.iteration else 0
        batch, batch_before = lengths.global_batch_size, self.global_batch_size or mean_batch
        differences = []
        if batch_before not in (0, batch):
            if lengths.vary:
                raise CheckpointError(
                    f"the global batch ({batch} sequences) differs from the checkpoint's ({batch_before}), from which "
                    "the lengths of the samples follow with --seq-length-schedule and --group-by-length; give "
                    f"--global-batch-size {batch_before}, or --finetune to load the weights alone."
                )
            differences.append(
                f"the global batch ({batch} sequences) differs from the checkpoint's ({batch_before}): "
                "what is left of --train-iters, --train-samples or --train-tokens is taken in steps of the new size; "
                f"give --global-batch-size {batch_before} to keep the old one"
            )
        if self.seq_length:
            differences += self._continue_in_the_data(lengths)
        if self.iteration and batch_before not in (0, batch):
            self._add_change()
        self.global_batch_size = batch
        self.phases = [list(phase) for phase in lengths.phases] if lengths.is_scheduled else []
        self.is_grouped = lengths.is_grouped
        self.enter(lengths.at(self.data_samples))
        return differences

    def enter(self, seq_length: int) -> None:
        """Take the next steps at this length."""
        if self.iteration and self.seq_length != seq_length:
            self._add_change()
        self.seq_length = seq_length

    def _add_change(self) -> None:
        counts = list(self.counts)
        if self.changes[-1:] != [counts]:
            self.changes.append(counts)

    def _continue_in_the_data(self, lengths: SampleLengths) -> list[str]:
        """Find the position in samples of these lengths; return what that means for the data, if it is another one."""
        before = SampleLengths(
            tuple((first, length) for first, length in self.phases) or ((0, self.seq_length),),
            lengths.global_batch_size,
            self.is_grouped,
        )
        position = self.data_samples
        if (before.until(position), before.is_grouped) == (lengths.until(position), lengths.is_grouped):
            return []
        if lengths.is_scheduled:
            batch = lengths.global_batch_size
            self.data_samples = -(-self.consumed_samples // batch) * batch
            return [
                "--seq-length-schedule differs from the checkpoint's up to here: the data continue at sample "
                f"{self.data_samples} of the new one, which may repeat and leave out tokens"
            ]
        self.data_samples = 0
        again = "the data start again at their first sample"
        (length,), longest = {length for _, length in lengths.phases}, max(length for _, length in before.phases)
        if length != longest:
            return [f"--seq-length ({length}) differs from the checkpoint's ({longest}): {again}"]
        flag = "--seq-length-schedule" if before.is_scheduled else "--group-by-length"
        return [f"{flag} differs from the checkpoint's: {again}"]

    @property
    def course(self) -> Course:
        """The counts of the run so far, continued at the current batch and length."""
        straight = Course.straight(self.global_batch_size, self.seq_length)
        changes = tuple((iterations, samples, tokens) for iterations, samples, tokens in self.changes)
        return Course((*straight.corners, *changes), straight.step)

    @property
    def counts(self) -> Counts:
        """The iterations, samples and tokens so far."""
        return self.iteration, self.consumed_samples, self.consumed_tokens

    def leave_out_data_of(self, state: TrainState) -> None:
        """Continue from this older state, but skip the data that the run has read up to `state`."""
        self.left_out_samples += state.data_samples - self.data_samples
        self.data_samples = state.data_samples
        self.rollbacks = state.rollbacks + 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
