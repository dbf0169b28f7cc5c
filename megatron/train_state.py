"""Counters of a run: everything that training advances and a checkpoint carries, apart from tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """How far a run has come. `data_samples` is the position in the data of the present sequence length.

    Samples that a rollback left out are in it, and in `left_out_samples`; they are not consumed.
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

    def advance(self, samples: int, seq_length: int) -> None:
        """Count one step."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += samples * seq_length
        self.data_samples += samples

    def start_data(self, seq_length: int) -> bool:
        """Take the data up at `seq_length`; another length than before starts at its first sample, and returns True."""
        changed = self.seq_length not in (0, seq_length)
        if changed:
            self.data_samples = 0
        self.seq_length = seq_length
        return changed

    def leave_out_data_of(self, state: TrainState) -> None:
        """Go on from this state, which was saved before, behind the data that a run has read up to `state`."""
        self.left_out_samples += state.data_samples - self.data_samples
        self.data_samples = state.data_samples
        self.rollbacks = state.rollbacks + 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
