"""Samples grouped by length: the samples of each global batch are of one length, and batches differ in length.

Each bucket holds the sequences of one length. The batches of an epoch come in an order of their own:

    bucket  4096   a a a a | a a a a                batches of four sequences
    bucket  8192   b b b b
    bucket 16384   c c c c | c c - -                the longest; what fills no batch comes first in the next epoch
    epoch          b b b b | a a a a | c c c c | a a a a

All buckets but the longest hold whole batches. So sample i is a function of (sequences, batch size, seed, i).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.batch import Sample
from megatron.data.sample_order import SAMPLE_STREAM, epoch_random
from megatron.finetuning.packing import Packing

GROUP_STREAM = SAMPLE_STREAM + 2
NUM_HALVINGS = 6


class LengthBucket(Protocol):
    """Sequences of one length, epoch after epoch, each in an order of its own."""

    packing: Packing

    def __getitem__(self, index: int, /) -> Sample: ...


class GroupedDataset:
    """`num_samples` samples of several buckets, `group_size` of one bucket after another."""

    def __init__(self, buckets: Sequence[LengthBucket], group_size: int, num_samples: int, seed: int) -> None:
        """Every bucket but the last holds a multiple of `group_size` sequences."""
        self._buckets, self._group_size, self._num_samples, self._seed = buckets, group_size, num_samples, seed
        self._sizes = [len(bucket.packing) for bucket in buckets]
        self._order = (0, self._groups_of(0))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, whose length is that of its bucket."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        group, place = divmod(index, self._group_size)
        total = sum(self._sizes)
        epoch = ((group + 1) * self._group_size - 1) // total
        order = self._order
        if order[0] != epoch:
            self._order = order = (epoch, self._groups_of(epoch))
        bucket, number = order[1][group - epoch * total // self._group_size].tolist()
        return self._buckets[bucket][number * self._group_size + place]

    def _groups_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the batches of an epoch in their order, int64 [n, 2]: bucket, and number of the batch in it."""
        groups = [
            (bucket, number)
            for bucket, size in enumerate(self._sizes)
            for number in range(epoch * size // self._group_size, (epoch + 1) * size // self._group_size)
        ]
        return epoch_random(self._seed, epoch, GROUP_STREAM).permutation(np.array(groups, np.int64).reshape(-1, 2))


def bucket_lengths(seq_length: int, longest: int, sequence_parallel_size: int) -> list[int]:
    """Return the lengths of buckets, ascending: `seq_length` halved again and again, up to what `longest` tokens need.

    Each is a multiple of the sequence-parallel size.
    """
    size = sequence_parallel_size
    lengths = sorted({-(-(seq_length // size) // 2**n) * size for n in range(NUM_HALVINGS + 1)})
    needed = next(length for length in lengths if length >= longest)
    return [length for length in lengths if length <= needed]
