"""Document masks: documents share a sequence without attending to each other, which shrinks an attention tile.

A token sees its own document, from its beginning to the token itself. Of a tile below the diagonal (queries of one
chunk, keys of an earlier one) at most one document per sequence has tokens on both sides, and as a document is
contiguous it has all from its beginning to the end of the keys, and all from the first query to its end:

    keys of the tile       . . . [s . . . . .|              s where the document begins, e where it ends
    queries of the tile                      |. . . . e] . .

so the tile shrinks to a rectangle without a mask. On the diagonal each document leaves a causal square. A rank that has
only some rows of the chunk does the same for each span of them; a span on the diagonal has a rectangle too, the keys of
its chunk before it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise

Span = tuple[int, int]  # first position, one past the last

EVERYTHING: Span = (0, sys.maxsize)


class Mask(Enum):
    """The keys j that query i sees, both counted from the beginning of a region. All but FULL are of squares."""

    FULL = "full"
    """All."""

    CAUSAL = "causal"
    """j <= i."""

    UPPER = "upper"
    """j >= i."""


@dataclass(frozen=True)
class Region:
    """A rectangle of a tile: spans of its sequences, queries and keys, counted from the beginning of the tile."""

    sequences: Span = EVERYTHING
    queries: Span = EVERYTHING
    keys: Span = EVERYTHING
    mask: Mask = Mask.FULL
    merged: bool = False
    """Whether it shares queries or keys with regions before it."""

    window: int | None = None
    """Of a causal region: query i sees only the last `window` keys up to its own, j > i - window."""

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tile, which has no other region then."""
        return self.keys == self.queries == self.sequences == EVERYTHING

    @property
    def in_queries(self) -> tuple[slice, slice]:
        """Its slices of the tile's queries [S, B, ..]."""
        return slice(*self.queries), slice(*self.sequences)

    @property
    def in_keys(self) -> tuple[slice, slice]:
        """Its slices of the tile's keys and values [S, B, ..]."""
        return slice(*self.keys), slice(*self.sequences)

    @property
    def in_lse(self) -> tuple[slice, slice, slice]:
        """Its slices of the log-sum-exps [B, H, S] of the tile's queries."""
        return slice(*self.sequences), slice(None), slice(*self.queries)


FULL_TILE = (Region(),)
CAUSAL_TILE = (Region(mask=Mask.CAUSAL),)


@dataclass(frozen=True, eq=False)
class Documents:
    """Spans of the documents in each sequence of a micro-batch, ascending. Tokens in none of them are padding.

    Padding attends to nothing and nothing attends to it: its attention output is zero.
    """

    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def from_starts(cls, starts: Sequence[Sequence[int]], sequence_length: int) -> Documents:
        """Return documents that begin at `starts` of each sequence, the first at 0; each ends where the next begins."""
        rows = ((*map(int, row), sequence_length) for row in starts)
        return cls(tuple(tuple(pairwise(row)) for row in rows))

    @property
    def squared_lengths(self) -> int:
        """Sum of the squares of the documents' lengths, to which the work of causal attention is proportional."""
        return sum((end - start) ** 2 for row in self.spans for start, end in row)

    def first_key(self, query: int) -> int:
        """Return the earliest position that a token at `query`, of any of the sequences, attends to."""
        seen = (span for row in self.spans for span in _overlapping(row, (query, query + 1)))
        return min((start for start, _ in seen), default=query)

    def regions(self, queries: Span, keys: Span) -> tuple[Region, ...]:
        """Return the regions of a tile to compute: causal squares on the diagonal, rectangles below it."""
        mask = Mask.CAUSAL if queries == keys else Mask.FULL
        across = queries if mask is Mask.CAUSAL else (queries[0], queries[0] + 1)
        found = [
            (row, _shared(span, queries), _shared(span, keys))
            for row, spans in enumerate(self.spans)
            for span in _overlapping(spans, across)
            if span[0] < keys[1]
        ]
        if len(found) == len(self.spans) and all((q, k) == (queries, keys) for _, q, k in found):
            return _whole_tile(queries, keys)
        return tuple(Region((row, row + 1), _shifted(q, queries[0]), _shifted(k, keys[0]), mask) for row, q, k in found)


def _whole_tile(queries: Span, keys: Span) -> tuple[Region, ...]:
    return CAUSAL_TILE if queries == keys else FULL_TILE


def tile_regions(documents: Documents | None, rows: Sequence[Span], keys: Span) -> tuple[Region, ...]:
    """Return the regions of a tile whose queries are some spans of rows of a chunk, one after the other.

    On the diagonal each span leaves a causal square, and the rectangle of the chunk's keys before it.
    """
    if keys[0] <= rows[0][0] < keys[1]:
        alone = [(row, row) for row in rows]
        merged = [(row, (keys[0], row[0])) for row in rows if row[0] > keys[0]]
    else:
        alone, merged = [(rows[0], keys)], [(row, keys) for row in rows[1:]]
    pieces = [*alone, *merged]
    found = [_whole_tile(*piece) if documents is None else documents.regions(*piece) for piece in pieces]
    if all(piece_keys == keys for _, piece_keys in pieces) and (len(rows) == 1 or set(found) == {FULL_TILE}):
        return found[0]
    starts = dict(zip(rows, accumulate((end - start for start, end in rows), initial=0), strict=False))
    return tuple(
        Region(
            region.sequences,
            _placed(region.queries, row, starts[row]),
            _placed(region.keys, piece_keys, piece_keys[0] - keys[0]),
            region.mask,
            merged=number >= len(alone),
        )
        for number, ((row, piece_keys), regions) in enumerate(zip(pieces, found, strict=True))
        for region in regions
    )


def _placed(span: Span, piece: Span, start: int) -> Span:
    """Return a span counted from the beginning of a piece as one of the tile, in which the piece starts at `start`."""
    return start + span[0], start + min(span[1], piece[1] - piece[0])


def _overlapping(spans: Sequence[Span], positions: Span) -> Sequence[Span]:
    """Return the spans that overlap with `positions`."""
    first = bisect_right(spans, positions[0], key=lambda span: span[1])
    last = bisect_right(spans, positions[1] - 1, key=lambda span: span[0])
    return spans[first:last]


def _shared(span: Span, other: Span) -> Span:
    return max(span[0], other[0]), min(span[1], other[1])


def _shifted(span: Span, origin: int) -> Span:
    return span[0] - origin, span[1] - origin
