"""Token ids that are read lazily, when they are sliced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron.core.documents import Span

BLOCK_TOKENS = 2**16


class Tokens(Protocol):
    """A sequence of token ids: an array, or an object that reads slices from a file, in the file's dtype."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> npt.NDArray[Any]: ...


def blocks(spans: Iterable[Span]) -> Iterator[Span]:
    """Cut each span, in order, into spans of at most BLOCK_TOKENS, which take little memory to read."""
    for start, stop in spans:
        for first in range(start, stop, BLOCK_TOKENS):
            yield first, min(first + BLOCK_TOKENS, stop)


def read_pieces(
    bounds: npt.NDArray[np.int64], span: slice, read: Callable[[int, int, int], npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """Read a slice of concatenated pieces, and from each piece only the tokens that the slice covers.

    bounds int64 [num_pieces + 1]: where each piece begins, and where the last ends. read(piece, start, stop) returns
    tokens [start, stop) of a piece, counted from its own beginning. A slice within one piece is not copied.
    """
    start, stop, step = span.indices(int(bounds[-1]))
    if step != 1:
        raise IndexError(f"tokens are read one after the other; a step of {step} is not possible")
    first, last = int(np.searchsorted(bounds, start, side="right")) - 1, int(np.searchsorted(bounds, stop))
    parts = []
    for piece, (begin, end) in enumerate(pairwise(bounds[first : last + 1].tolist()), first):
        parts.append(read(piece, max(start - begin, 0), min(stop, end) - begin))
    if not parts:
        return np.empty(0, np.int64)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
