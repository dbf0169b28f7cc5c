"""The messages of the all-to-all between tokens and heads, as plain data: which rows and heads of a tensor go to whom.

Sizes count rows x heads, of each of which a tensor has B D elements (B batch, D head size).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby

from megatron.core.documents import Span
from megatron.core.head_layout import HeadLayout


@dataclass(frozen=True)
class Run:
    """What consecutive ranks get: a block each, of the same rows and of equally many heads of each tensor."""

    num_ranks: int
    num_rows: int
    rows: slice
    heads: tuple[slice, ...]  # of all the ranks and shares, in each part of a tensor
    widths: tuple[int, ...]  # heads of one rank and share, of all parts of a tensor
    size: int  # of all blocks
    is_everything: bool  # all rows, and all heads


@dataclass(frozen=True)
class Message:
    """What a rank sends when tokens are gathered and heads scattered, and what it receives. The way back inverts it."""

    tensors: tuple[int, ...]  # that travel in it, by number
    parts: tuple[int, ...]  # of each tensor
    runs: tuple[Run, ...]
    num_heads: tuple[int, ...]  # of each tensor while its heads are whole
    widths: tuple[int, ...]  # of each tensor: this rank's heads in a share
    num_rows: int  # received
    num_shares: int  # messages for all heads
    sent_sizes: tuple[int, ...]  # to each rank
    received_sizes: tuple[int, ...]  # from each rank

    @cached_property
    def is_even(self) -> bool:
        """Whether every rank sends and receives equally much to and from each: one run holds everything."""
        return self.runs[0].is_everything

    @cached_property
    def sent_size(self) -> int:
        """Size of all that is sent."""
        return sum(self.sent_sizes)


@lru_cache(maxsize=256)
def plan_messages(
    heads: HeadLayout, rank: int, num_tokens: int, parts: tuple[int, ...], num_shares: int = 1
) -> tuple[Message, ...]:
    """Plan the messages of tensors with these parts, for a rank that owns `num_tokens` tokens of the chunk.

    All tensors travel together, unless ranks share the rows: then those of queries travel by themselves. There are as
    many such messages for each of `num_shares` equal shares of every rank's heads.
    """
    together = [tuple(range(len(parts)))]
    if heads.num_row_shares > 1:
        together = [tuple(i for i in together[0] if (parts[i] == 1) == for_queries) for for_queries in (True, False)]
    return tuple(_message(heads, rank, num_tokens, parts, tensors, num_shares) for tensors in together if tensors)


def _message(
    heads: HeadLayout,
    rank: int,
    num_tokens: int,
    all_parts: tuple[int, ...],
    tensors: tuple[int, ...],
    num_shares: int,
) -> Message:
    ranks, of_ranks = range(heads.num_ranks), heads.heads_of_groups * heads.num_row_shares
    parts = tuple(all_parts[i] for i in tensors)
    for_queries = parts[0] == 1
    sent = [_rows(heads, rank, receiver, num_tokens) if for_queries else (0, num_tokens) for receiver in ranks]
    received = [_rows(heads, sender, rank, num_tokens) if for_queries else (0, num_tokens) for sender in ranks]
    widths = [tuple(n // num_shares for n in _widths(heads, num_heads, parts)) for num_heads in of_ranks]
    return Message(
        tensors=tensors,
        parts=parts,
        runs=tuple(_runs(heads, sent, num_tokens, parts, num_shares)),
        num_heads=_widths(heads, heads.num_heads if for_queries else sum(of_ranks), parts),
        widths=widths[rank],
        num_rows=sum(map(_length, received)),
        num_shares=num_shares,
        sent_sizes=tuple(_length(rows) * sum(each) for rows, each in zip(sent, widths, strict=True)),
        received_sizes=tuple(_length(rows) * sum(widths[rank]) for rows in received),
    )


def _rows(heads: HeadLayout, sender: int, receiver: int, num_tokens: int) -> Span:
    """Return which of the sender's tokens are among the receiver's rows. They are adjacent: a part is no shorter."""
    origin = sender * num_tokens
    spans = heads.rows(receiver).spans(num_tokens * heads.num_ranks)
    own = [(max(start - origin, 0), min(end - origin, num_tokens)) for start, end in spans]
    return next((span for span in own if _length(span) > 0), (0, 0))


def _runs(
    heads: HeadLayout, sent: Sequence[Span], num_tokens: int, parts: tuple[int, ...], num_shares: int
) -> Iterator[Run]:
    """Yield the runs of ranks that get anything, in order of ranks.

    Each share gets the heads of queries from the first on. Keys and values have been repeated for each share.
    """
    of_ranks = heads.heads_of_groups * heads.num_row_shares
    starts = [*accumulate(of_ranks, initial=0)]
    for ((start, end), each), members in groupby(range(len(sent)), lambda rank: (sent[rank], of_ranks[rank])):
        first, *others = members
        num_ranks, first_head = 1 + len(others), starts[first]
        if parts[0] == 1:
            first_head %= heads.num_heads
        if start < end:
            spans = [(first_head // unit, (first_head + num_ranks * each) // unit) for unit in _units(heads, parts)]
            widths = tuple(n // num_shares for n in _widths(heads, each, parts))
            yield Run(
                num_ranks=num_ranks,
                num_rows=end - start,
                rows=slice(start, end),
                heads=tuple(slice(*span) for span in spans),
                widths=widths,
                size=num_ranks * (end - start) * sum(widths),
                is_everything=num_ranks == len(sent) and (start, end) == (0, num_tokens),
            )


def _units(heads: HeadLayout, parts: tuple[int, ...]) -> list[int]:
    """Return the query heads for each head of a tensor."""
    return [1 if n == 1 else heads.queries_per_key for n in parts]


def _widths(heads: HeadLayout, num_heads: int, parts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the heads of each tensor that belong to so many query heads."""
    return tuple(n * num_heads // unit for n, unit in zip(parts, _units(heads, parts), strict=True))


def _length(span: Span) -> int:
    return max(span[1] - span[0], 0)
