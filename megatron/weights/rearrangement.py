"""Rearrangements that join another program's tensors into one of our parameters and split it into them again.

A rearrangement moves numbers and computes none, so a round trip is exact. It works for weights [out, in] and for biases
[out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rearrangement(Protocol):
    """Maps their tensors to our parameter and back."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Join their tensors into our parameter."""
        ...

    def split(self, ours: Tensor) -> Sequence[Tensor]:
        """Split our parameter into their tensors."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        (tensor,) = theirs
        return tensor

    def split(self, ours: Tensor) -> Sequence[Tensor]:
        return [ours]


@dataclass(frozen=True)
class Transposed:
    """One tensor whose weights are stored [in, out], as GPT-2's Conv1D does."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        (tensor,) = theirs
        return _transposed(tensor)

    def split(self, ours: Tensor) -> Sequence[Tensor]:
        return [_transposed(ours)]


@dataclass(frozen=True)
class Stacked:
    """Several tensors of one size, concatenated along rows: gate and up."""

    count: int

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(theirs))

    def split(self, ours: Tensor) -> Sequence[Tensor]:
        return ours.chunk(self.count)


@dataclass(frozen=True)
class GroupedHeads:
    """Queries, keys and values, interleaved per key/value head: its queries, its key, its value."""

    num_key_value_heads: int
    queries_per_group: int
    head_size: int

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        grouped = [t.unflatten(0, (self.num_key_value_heads, -1)) for t in theirs]  # [nD, ...] -> [K, n/K D, ...]
        return torch.cat(grouped, 1).flatten(0, 1)

    def split(self, ours: Tensor) -> Sequence[Tensor]:
        grouped = ours.unflatten(0, (self.num_key_value_heads, -1))  # [(H + 2K) D, ...] -> [K, (H/K + 2) D, ...]
        sizes = [self.queries_per_group * self.head_size, self.head_size, self.head_size]
        return [t.flatten(0, 1) for t in grouped.split(sizes, 1)]


@dataclass(frozen=True)
class TransposedHeads:
    """GPT-2's single tensor of all queries, then all keys, then all values, stored [in, out]."""

    heads: GroupedHeads

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        (tensor,) = theirs
        return self.heads.join(_transposed(tensor).chunk(3))

    def split(self, ours: Tensor) -> Sequence[Tensor]:
        return [_transposed(torch.cat(list(self.heads.split(ours))))]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t() if tensor.dim() == 2 else tensor
