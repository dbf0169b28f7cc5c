"""Sequence layout: the global tokens that a sequence-parallel rank owns, and their order.

Chunk i covers the global tokens [iC, (i+1)C); rank r of p owns the r-th of the chunk's p equal slices. A rank's local
sequence is its slices in the order of the chunks. After the all-to-all of chunk i every rank holds the whole chunk,
contiguous, for its share of the heads. The last chunk may be shorter. Plain Ulysses is the same layout with one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron.core.documents import Span


@dataclass(frozen=True)
class SequenceLayout:
    """`sequence_length` tokens in chunks of `chunk_length` tokens over `sequence_parallel_size` ranks."""

    sequence_length: int
    chunk_length: int
    sequence_parallel_size: int = 1

    def __post_init__(self) -> None:
        p = self.sequence_parallel_size
        for name, value in (("sequence length", self.sequence_length), ("chunk length", self.chunk_length)):
            if value < p or value % p:
                raise ValueError(
                    f"the {name} ({value}) must be a positive multiple of the sequence-parallel size ({p}); "
                    f"use {max(p, value // p * p)} or {value // p * p + p}."
                )

    @property
    def num_chunks(self) -> int:
        return -(-self.sequence_length // self.chunk_length)

    @cached_property
    def chunk_lengths(self) -> tuple[int, ...]:
        """Global tokens of each chunk."""
        full, rest = divmod(self.sequence_length, self.chunk_length)
        return (self.chunk_length,) * full + (rest,) * (rest > 0)

    @cached_property
    def local_lengths(self) -> tuple[int, ...]:
        """Tokens of each chunk that one rank owns."""
        return tuple(length // self.sequence_parallel_size for length in self.chunk_lengths)

    @property
    def local_length(self) -> int:
        """Tokens of the sequence that one rank owns."""
        return self.sequence_length // self.sequence_parallel_size

    def tokens_after(self, length: int) -> int:
        """Return the tokens of one rank beyond the first `length` that it owns of each chunk."""
        return sum(max(local_length - length, 0) for local_length in self.local_lengths)

    def owned_spans(self, sequence_parallel_rank: int) -> list[Span]:
        """Return the spans of global tokens that a rank owns, one per chunk, in local order."""
        rank, starts = sequence_parallel_rank, range(0, self.sequence_length, self.chunk_length)
        return [
            (start + rank * length, start + (rank + 1) * length)
            for start, length in zip(starts, self.local_lengths, strict=True)
        ]

    def owned_positions(self, sequence_parallel_rank: int) -> torch.Tensor:
        """Return the global token positions that a rank owns, int64 [local_length], in local order."""
        return torch.cat([torch.arange(*span) for span in self.owned_spans(sequence_parallel_rank)])
