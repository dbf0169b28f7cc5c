"""Rows of attention tiles: a query chunk against the key/value chunks it sees, one tile after the other.

    forward    (o, lse) merged by online softmax over the tiles of the row
    backward   given o and lse of the whole row: dq is summed over the row, dk and dv over the column. dk and dv are
               stored on the tier, except those of the next row's own chunk, which stay on the device

Sums are in fp32, or fp64 for fp64. C tokens of a chunk, B batch, H and K query and key/value heads of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.plan import ChunkPlan, Tile
from megatron.fpdt.store import ChunkStore, Prefetch
from megatron.ops.attention import (
    QKV,
    AttentionBackend,
    AttentionOutput,
    AttentionVariant,
    backward_regions,
    forward_regions,
)
from megatron.ops.gradient_sum import accumulation_dtype
from megatron.ops.merge import (
    add_,
    add_gradients_,
    add_key_value_gradients_,
    merge,
    merge_,
    merge_sinks_,
    with_sinks,
)


@dataclass(frozen=True)
class TileRow:
    """The tiles of a query chunk in order of execution, the diagonal first, and how they are computed."""

    attention: AttentionBackend
    variant: AttentionVariant
    tiles: list[Tile]


class QueryChunk(NamedTuple):
    """What the backward tiles of a row read of its queries: q, o and do [C, B, H, D], and lse [B, H, C]."""

    q: Tensor
    output: AttentionOutput
    do: Tensor


# One function per tile: its locals die on return, so a tile's buffers are free before the next prefetch.


def attend(
    row: TileRow, q_CBHD: Tensor, kv_CBKD: Tensor, kv_ahead: Prefetch, sinks_H: Tensor | None = None
) -> AttentionOutput:
    """Compute one row of tiles: o [C, B, H, D] in the dtype of q, and lse [B, H, C], with the sinks of the heads.

    `kv_CBKD` is that of the row's own chunk; `kv_ahead` prefetches kv of the other tiles.
    """
    results = _forward_tiles(row, q_CBHD, kv_CBKD, kv_ahead)
    o, lse = next(results)
    if len(row.tiles) > 1:
        o = o.to(accumulation_dtype(q_CBHD.dtype))
    for tile in row.tiles[1:]:
        if tile.is_trimmed:
            own = slice(*tile.queries)
            merge_(o[own], lse[:, :, own], *next(results))
        else:
            merge_(o, lse, *next(results))
    if sinks_H is not None:
        merge_sinks_(o, lse, sinks_H)
    return AttentionOutput(o.to(q_CBHD.dtype), lse)


def attend_one_token(
    row: TileRow, q_1BHD: Tensor, kv_1BKD: Tensor, kv_ahead: Prefetch, sinks_H: Tensor | None = None
) -> Tensor:
    """Compute one row of tiles for a single query: o [1, B, H, D] in the dtype of q.

    The partial results are small. Merging them one by one would take the host longer than the GPU, so they are merged
    all at once.
    """
    results = list(_forward_tiles(row, q_1BHD, kv_1BKD, kv_ahead))
    return merge(results if sinks_H is None else with_sinks(results, sinks_H)).to(q_1BHD.dtype)


def _forward_tiles(row: TileRow, q: Tensor, kv: Tensor, kv_ahead: Prefetch) -> Iterator[AttentionOutput]:
    """Yield (o, lse) of each tile of a row, and hold no reference to it. A tile runs when its result is asked for."""
    diagonal, *others = row.tiles
    _start(kv_ahead, diagonal)
    yield _forward_tile(row, diagonal, q, kv)
    for tile in others:
        (kv,) = next(kv_ahead)
        _start(kv_ahead, tile)
        yield _forward_tile(row, tile, q, kv)
        del kv


def _start(kv_ahead: Prefetch, tile: Tile) -> None:
    """Prefetch the keys and values of the next tile while `tile` runs."""
    if tile.next_is_stored:
        kv_ahead.start()


def _forward_tile(row: TileRow, tile: Tile, q: Tensor, kv: Tensor) -> AttentionOutput:
    if tile.is_trimmed:
        q, kv = q[slice(*tile.queries)], kv[slice(*tile.keys)]
    return forward_regions(row.attention, QKV(q, *kv.chunk(2, 2)), row.variant, tile.regions)


def backward_tile_inputs(tile: Tile, kv_CBKD: Mapping[int, Tensor], dkv_CBKD: Mapping[int, Tensor]) -> list[Tensor]:
    """Return the chunks that a backward tile off the diagonal loads: kv, and the dkv summed so far if there is one."""
    kv = kv_CBKD[tile.key]
    return [kv] if tile.first_of_column else [kv, dkv_CBKD[tile.key]]


class BackwardTiles:
    """The tiles of a backward pass: their inputs are prefetched, and dkv is summed on the tier."""

    def __init__(self, store: ChunkStore, plan: ChunkPlan, kv_CBKD: Mapping[int, Tensor]) -> None:
        dkv_CBKD: dict[int, Tensor] = {}  # of the columns under way
        self._store, self._dkv_CBKD = store, dkv_CBKD
        tiles = (tile for row in plan.backward_rows() for tile in row if not tile.is_diagonal)
        inputs = (backward_tile_inputs(tile, kv_CBKD, dkv_CBKD) for tile in tiles)
        self._ahead = store.prefetch(inputs, ahead=False)

    def attend(
        self, row: TileRow, queries: QueryChunk, own: list[Tensor], row_ahead: Prefetch
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute a row of tiles: final (dq, dkv) of the row's chunk in the dtype of q, and dkv of the previous chunk.

        The dkv of all other chunks is stored. `own` is emptied: it holds kv of the row's chunk, and its dkv if there is
        one. `row_ahead` prefetches the inputs of the next row.
        """
        diagonal, *others = row.tiles
        dtype, sum_dtype = queries.q.dtype, accumulation_dtype(queries.q.dtype)
        (self._ahead if others else row_ahead).start()
        dq, dkv_row = _backward_tile(row, diagonal, queries, None, *_popped(own))
        dkv_row = dkv_row.to(dtype)
        if others:
            dq = dq.to(sum_dtype)
        dkv_before = None
        for tile in others:
            inputs = next(self._ahead)
            # During the last tile there is no next tile to prefetch; the next row's inputs are prefetched instead.
            (row_ahead if tile is others[-1] else self._ahead).start()
            backward_tile = _backward_trimmed_tile if tile.is_trimmed else _backward_tile
            dq, dkv_tile = backward_tile(row, tile, queries, dq, *inputs)
            dkv_tile = dkv_tile.to(sum_dtype)
            if tile is others[-1]:
                dkv_before = dkv_tile
            elif tile.first_of_column:
                self._dkv_CBKD[tile.key] = self._store.add(dkv_tile, ChunkKind.KEY_VALUE_GRADIENTS)
            else:
                self._store.put(self._dkv_CBKD[tile.key], dkv_tile)
            del inputs, dkv_tile
        return dq.to(dtype), dkv_row, dkv_before


def _popped(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors, and hold no reference to them."""
    while tensors:
        yield tensors.pop(0)


def _backward_tile(
    row: TileRow,
    tile: Tile,
    queries: QueryChunk,
    dq_sum: Tensor | None,
    kv: Tensor,
    dkv_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (dq, dkv) of one tile, added to the sums so far; in the dtype of q where there is no sum."""
    q, output, do = queries
    qkv = QKV(q, *kv.chunk(2, 2))
    dq, dk, dv = backward_regions(row.attention, do, qkv, output, row.variant, tile.regions)
    if dq_sum is not None and dkv_sum is not None:
        add_gradients_(dq_sum, dkv_sum, dq, dk, dv)
    elif dq_sum is not None:
        add_(dq_sum, dq)
    elif dkv_sum is not None:
        add_key_value_gradients_(dkv_sum, dk, dv)
    return dq if dq_sum is None else dq_sum, torch.cat([dk, dv], 2) if dkv_sum is None else dkv_sum


def _backward_trimmed_tile(
    row: TileRow, tile: Tile, queries: QueryChunk, dq_sum: Tensor, kv: Tensor, dkv_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute (dq, dkv) of one tile, added to the sums so far. Only a part of them changes."""
    own, keys = slice(*tile.queries), slice(*tile.keys)
    output = AttentionOutput(queries.output.o[own], queries.output.lse[:, :, own].contiguous())
    qkv = QKV(queries.q[own], *kv[keys].chunk(2, 2))
    gradients = backward_regions(row.attention, queries.do[own], qkv, output, row.variant, tile.regions)
    if dkv_sum is None:
        dkv_sum = torch.zeros_like(kv, dtype=dq_sum.dtype)
    add_gradients_(dq_sum[own], dkv_sum[keys], *gradients)
    return dq_sum, dkv_sum
