"""Masks of a causal sequence: which regions of an attention tile are computed, a tile being queries against keys.

Documents share a sequence without attending to each other. A token sees its own document, from its beginning to the
token itself. Of a tile below the diagonal (queries of one chunk, keys of an earlier one) at most one document per
sequence has tokens on both sides, and as a document is contiguous it has all from its beginning to the end of the keys,
and all from the first query to its end:

    keys of the tile       . . . [s . . . . .|              s where the document begins, e where it ends
    queries of the tile                      |. . . . e] . .

so the tile shrinks to a rectangle without a mask. On the diagonal each document leaves a causal square. A rank that has
only some rows of the chunk does the same for each span of them; a span on the diagonal has a rectangle too, the keys of
its chunk before it.

Local blocks are documents cut into pieces of one length, each from its own start on, as positions restart there.

In a sliding window of w tokens, query q sees keys from q - w + 1 on. So a rectangle below the diagonal loses a corner.
What is left of the queries [a, b) and the keys [c, d), of which queries up to c + w - 1 see all, is cut into three:

    keys           c          b - w + 1        d
    queries a      |    FULL      |            |
      c + w - 1    |    UPPER     |    FULL    |            UPPER is square: query i of it sees its keys j >= i
            b      |              |            |
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

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

    Padding attends to nothing and nothing attends to it: its attention output is zero. A single row of spans holds for
    all sequences.
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

    def by_sequences(self) -> Iterator[tuple[Span, tuple[Span, ...]]]:
        """Yield (sequences, the spans of the documents that each of them has)."""
        if len(self.spans) == 1:
            yield EVERYTHING, self.spans[0]
        else:
            yield from (((row, row + 1), spans) for row, spans in enumerate(self.spans))


ONE_DOCUMENT = Documents(((EVERYTHING,),))

Piece = tuple[Span, Span, Mask, int | None]  # queries, keys, mask and window of a region, as positions of the sequence


def in_local_blocks(documents: Documents | None, block: int | None, sequence_length: int) -> Documents | None:
    """Return documents that are cut into blocks, each from its own start on; whole sequences if there are none."""
    if block is None:
        return documents
    rows = (((0, sequence_length),),) if documents is None else documents.spans
    return Documents(tuple(tuple(piece for span in row for piece in _cut(span, block)) for row in rows))


def tile_regions(
    documents: Documents | None, rows: Sequence[Span], keys: Span, window: int | None = None
) -> tuple[Region, ...]:
    """Return the regions of a tile whose queries are some spans of rows of a chunk, one after the other.

    On the diagonal each span leaves a causal square, and the rectangle of the chunk's keys before it. With a `window`
    a query sees only so many keys up to its own.
    """
    is_below_diagonal = rows[0][0] >= keys[1]
    if documents is None and window is None and (is_below_diagonal or list(rows) == [keys]):
        return FULL_TILE if is_below_diagonal else CAUSAL_TILE
    found = [
        _regions_of_sequences(sequences, spans, rows, keys, window)
        for sequences, spans in (documents or ONE_DOCUMENT).by_sequences()
    ]
    whole = (0, sum(end - start for start, end in rows)), (0, keys[1] - keys[0])
    if all(len(regions) == 1 and (regions[0].queries, regions[0].keys) == whole for regions in found):
        return (Region(mask=found[0][0].mask, window=found[0][0].window),)
    return tuple(region for regions in found for region in regions)


def trimmed(regions: tuple[Region, ...]) -> tuple[Span, Span, tuple[Region, ...]]:
    """Return the queries and keys that the regions of a tile span, and the regions within those."""
    if regions[0].is_whole:
        return EVERYTHING, EVERYTHING, regions
    (first, end), (first_key, end_of_keys) = (
        (min(start for start, _ in spans), max(end for _, end in spans))
        for spans in zip(*((region.queries, region.keys) for region in regions), strict=True)
    )
    if len(regions) == 1 and regions[0].sequences == EVERYTHING:
        regions = (Region(mask=regions[0].mask, window=regions[0].window),)
    else:
        regions = tuple(
            replace(each, queries=_shifted(each.queries, first), keys=_shifted(each.keys, first_key))
            for each in regions
        )
    return (first, end), (first_key, end_of_keys), regions


def _regions_of_sequences(
    sequences: Span, spans: Sequence[Span], rows: Sequence[Span], keys: Span, window: int | None
) -> list[Region]:
    """Return the regions of a tile in sequences that have documents in these spans."""
    regions: list[Region] = []
    in_tile = 0  # where the row begins in the tile
    for row in rows:
        for span in _overlapping(spans, row):
            if span[0] >= keys[1]:
                break
            for piece, seen, mask, of_mask in _pieces(_shared(span, row), _shared(span, keys), window):
                queries, seen = _shifted(piece, row[0] - in_tile), _shifted(seen, keys[0])
                if mask is Mask.FULL and regions and _continues(regions[-1], queries, seen):
                    regions[-1] = replace(regions[-1], queries=(regions[-1].queries[0], queries[1]))
                else:
                    merged = mask is not Mask.CAUSAL and bool(regions)
                    regions.append(Region(sequences, queries, seen, mask, merged, of_mask))
        in_tile += row[1] - row[0]
    return regions


def _continues(last: Region, queries: Span, keys: Span) -> bool:
    """Whether a rectangle below the last one sees the same keys."""
    return last.mask is Mask.FULL and last.keys == keys and last.queries[1] == queries[0]


def _pieces(queries: Span, keys: Span, window: int | None) -> list[Piece]:
    """Return what queries see of keys of the same document: keys before them, or that end with theirs."""
    if queries[0] >= keys[1]:
        return _pieces_below_diagonal(queries, keys, window)
    (first, end), first_key = queries, keys[0]
    diagonal = queries, queries, Mask.CAUSAL, window if window is not None and window < end - first else None
    before = _pieces_below_diagonal(queries, (first_key, first), window) if first_key < first else []
    return [diagonal, *before]


def _pieces_below_diagonal(queries: Span, keys: Span, window: int | None) -> list[Piece]:
    if window is None:
        return [(queries, keys, Mask.FULL, None)]
    (first, end), (first_key, end_of_keys) = queries, keys
    first_key, end = max(first_key, first - window + 1), min(end, end_of_keys + window - 1)
    if first_key >= end_of_keys:
        return []
    edge = first_key + window - 1  # queries up to this one see all keys
    if edge >= end - 1:
        return [((first, end), (first_key, end_of_keys), Mask.FULL, None)]
    end_of_square = first_key + end - edge
    cut: list[Piece] = [
        ((first, end), (end_of_square, end_of_keys), Mask.FULL, None),
        ((first, edge), (first_key, end_of_square), Mask.FULL, None),
        ((edge, end), (first_key, end_of_square), Mask.UPPER, None),
    ]
    return [piece for piece in cut if _is_span(piece[0]) and _is_span(piece[1])]


def _is_span(span: Span) -> bool:
    return span[0] < span[1]


def _cut(span: Span, block: int) -> Iterator[Span]:
    """Cut a span into blocks from its start on."""
    start, end = span
    return pairwise((*range(start, end, block), end))


def _overlapping(spans: Sequence[Span], positions: Span) -> Sequence[Span]:
    """Return the spans that overlap with `positions`."""
    first = bisect_right(spans, positions[0], key=lambda span: span[1])
    last = bisect_right(spans, positions[1] - 1, key=lambda span: span[0])
    return spans[first:last]


def _shared(span: Span, other: Span) -> Span:
    return max(span[0], other[0]), min(span[1], other[1])


def _shifted(span: Span, origin: int) -> Span:
    return span[0] - origin, span[1] - origin
