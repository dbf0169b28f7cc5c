"""Sliding windows for kernels that have none: a causal region with a window becomes regions without windows.

Its queries are taken in blocks of as many as the window w has keys. Against the keys of its own positions a block is
causal. Of the w keys before those, row r of the block sees all from r + 1 on. With w = 4, a whole block and one of two:

    keys         . 1 1 1 | 1 . . .             . 1 1 1 | 1 .
                 . . 1 1 | 1 1 . .             . . 1 1 | 1 1
                 . . . 1 | 1 1 1 .
                 . . . . | 1 1 1 1
                  UPPER    CAUSAL               UPPER of 2 x 2, then FULL of 2 x 1, then CAUSAL
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron.core.documents import Mask, Region


def without_windows(regions: Sequence[Region], num_queries: int) -> Sequence[Region]:
    """Return regions without windows that cover the same of a tile with `num_queries`."""
    if all(region.window is None for region in regions):
        return regions
    return [part for region in regions for part in _parts(region, num_queries)]


def _parts(region: Region, num_queries: int) -> Iterator[Region]:
    window, (first_query, end), first_key = region.window, region.queries, region.keys[0]
    length = min(end, num_queries) - first_query
    if window is None or window >= length:
        yield replace(region, window=None)
        return
    for start in range(0, length, window):
        rows = min(window, length - start)
        square = min(rows, window - 1) if start else 0  # the last row of a whole block sees none of the keys before it
        seen_from = start - window + 1
        for mask, num_rows, columns in (
            (Mask.CAUSAL, rows, (start, start + rows)),
            (Mask.UPPER, square, (seen_from, seen_from + square)),
            (Mask.FULL, square, (seen_from + square, start)),
        ):
            if num_rows and columns[0] < columns[1]:
                yield replace(
                    region,
                    queries=(first_query + start, first_query + start + num_rows),
                    keys=(first_key + columns[0], first_key + columns[1]),
                    mask=mask,
                    merged=region.merged or mask is not Mask.CAUSAL,
                    window=None,
                )
