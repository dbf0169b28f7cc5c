"""Best-fit packing of samples into sequences, in an order given by the seed, with a bounded number of open sequences.

A sample goes into the open sequence in which it leaves the least room. If it fits into none, a new one is opened;
beyond OPEN_SEQUENCES, the fullest is closed. That takes log OPEN_SEQUENCES steps per sample, and leaves little more
padding than best fit among all sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

OPEN_SEQUENCES = 256


@dataclass(frozen=True)
class Packing:
    """samples int64 [num_samples], sequence by sequence; bounds int64 [num_sequences + 1], where each begins."""

    samples: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def sequence(self, index: int) -> npt.NDArray[np.int64]:
        """Return the samples of a sequence, in order."""
        return self.samples[self.bounds[index] : self.bounds[index + 1]]

    def first(self, num_sequences: int) -> Packing:
        """Return the first sequences alone."""
        return Packing(self.samples[: self.bounds[num_sequences]], self.bounds[: num_sequences + 1])


def pack(lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int64], capacity: int) -> Packing:
    """Pack the samples `order` into sequences of `capacity` tokens.

    lengths int64 [..] are the lengths of all samples; those in `order` must not exceed `capacity`.
    """
    sequence_of = np.empty(len(order), np.int64)
    open_sequences: list[tuple[int, int]] = []  # (room, number), ascending
    num_sequences = 0
    for place, length in enumerate(lengths[order].tolist()):
        best = bisect_left(open_sequences, (length, 0))
        if best < len(open_sequences):
            room, number = open_sequences.pop(best)
        else:
            room, number, num_sequences = capacity, num_sequences, num_sequences + 1
        sequence_of[place] = number
        insort(open_sequences, (room - length, number))
        if len(open_sequences) > OPEN_SEQUENCES:
            open_sequences.pop(0)
    counts = np.bincount(sequence_of, minlength=num_sequences)
    return Packing(order[np.argsort(sequence_of, kind="stable")], np.concatenate(([0], np.cumsum(counts))))
