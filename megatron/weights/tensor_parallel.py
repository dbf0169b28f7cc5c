"""Merge the parts that upstream's tensor-parallel ranks hold into one of our parameters.

| parameter                                                     | parts of the ranks                              |
|---------------------------------------------------------------|-------------------------------------------------|
| word embedding, output layer                                  | rows, the padding of the vocabulary at the end  |
| query_key_value, weight and bias                              | rows: whole groups of queries, key and value    |
| dense_h_to_4h, weight and bias                                | rows; with SwiGLU each rank has its rows of the |
|                                                               | gate above its rows of the other half           |
| dense and dense_4h_to_h, weight                               | columns                                         |
| their biases, norms, learned positions                        | the same on every rank                          |
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.weights.errors import WeightsError

_ROWS = re.compile(r"(embedding\.word_embeddings|head\.output_layer|.*\.query_key_value)\.(weight|bias)$")
_HALVES = re.compile(r".*\.mlp\.dense_h_to_4h\.(weight|bias)$")
_COLUMNS = re.compile(r".*\.(self_attention\.dense|mlp\.dense_4h_to_h)\.weight$")


def merged_shape(name: str, shape: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """Return the shape of a parameter, given the shape of one rank's part."""
    if _COLUMNS.match(name):
        return (*shape[:-1], shape[-1] * num_ranks)
    if _ROWS.match(name) or _HALVES.match(name):
        return (shape[0] * num_ranks, *shape[1:])
    return tuple(shape)


def merge(name: str, parts: Sequence[Tensor], swiglu: bool) -> Tensor:
    """Merge the parts of one parameter, sorted by rank.

    WeightsError if ranks differ in a tensor that they share: their files come from different steps or runs.
    """
    if _COLUMNS.match(name):
        return torch.cat(list(parts), -1)
    if _HALVES.match(name) and swiglu:
        gates, others = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *others])
    if _ROWS.match(name) or _HALVES.match(name):
        return torch.cat(list(parts))
    for rank, part in enumerate(parts):
        if not torch.equal(part, parts[0]):
            raise WeightsError(
                f"{name} differs between the tensor-parallel ranks 0 and {rank}, which share it; copy the files of "
                "one checkpoint."
            )
    return parts[0]
