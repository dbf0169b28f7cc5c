"""Rows of attention tiles: a query chunk against the key/value chunks it sees, one tile after the other.

    forward    (o, lse) merged by online softmax over the tiles of the row
    backward   with o and lse of the whole row: dq summed over the row, dk and dv over the column, on the tier but
               for those that the next row begins with

Sums are in fp32, or fp64 for fp64. C tokens of a chunk, B batch, H and K query and key/value heads of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron.fpdt.plan import Tile
from megatron.fpdt.store import ChunkStore, Prefetch
from megatron.ops.attention import AttentionBackend, backward_regions, forward_regions
from megatron.ops.gradient_sum import accumulation_dtype
from megatron.ops.merge import add_, add_key_value_gradients_, merge, merge_

# What runs per tile is a function of its own, so that nothing of the last one is referenced when the next is sent for.


def attend(
    attention: AttentionBackend, scale: float, row: list[Tile], q_CBHD: Tensor, kv_CBKD: Tensor, kv_ahead: Prefetch
) -> tuple[Tensor, Tensor]:
    """One row of tiles: o [C, B, H, D] in the dtype of q, and lse [B, H, C].

    `kv_CBKD` is the row's own, `kv_ahead` brings those of the other tiles.
    """
    results = _forward_tiles(attention, scale, row, q_CBHD, kv_CBKD, kv_ahead)
    o, lse = next(results)
    if len(row) > 1:
        o = o.to(accumulation_dtype(q_CBHD.dtype))
    for result in results:
        merge_(o, lse, *result)
        del result
    return o.to(q_CBHD.dtype), lse


def attend_one_token(
    attention: AttentionBackend, scale: float, row: list[Tile], q_1BHD: Tensor, kv_1BKD: Tensor, kv_ahead: Prefetch
) -> Tensor:
    """As `attend`, for a single query: o [1, B, H, D] in the dtype of q.

    Its results are small, and a merge of each would take the host longer than the GPU: they are kept, and merged once.
    """
    return merge(list(_forward_tiles(attention, scale, row, q_1BHD, kv_1BKD, kv_ahead))).to(q_1BHD.dtype)


def _forward_tiles(
    attention: AttentionBackend, scale: float, row: list[Tile], q: Tensor, kv: Tensor, kv_ahead: Prefetch
) -> Iterator[tuple[Tensor, Tensor]]:
    """(o, lse) of each tile of a row, not referenced here any more; the next tile runs when it is asked for."""
    diagonal, *others = row
    _start(kv_ahead, diagonal)
    yield _forward_tile(attention, scale, diagonal, q, kv)
    for tile in others:
        (kv,) = next(kv_ahead)
        _start(kv_ahead, tile)
        yield _forward_tile(attention, scale, tile, q, kv)
        del kv


def _start(kv_ahead: Prefetch, tile: Tile) -> None:
    """Send for the keys and values of the next tile while `tile` runs."""
    if tile.next_is_stored:
        kv_ahead.start()


def _forward_tile(
    attention: AttentionBackend, scale: float, tile: Tile, q: Tensor, kv: Tensor
) -> tuple[Tensor, Tensor]:
    k, v = kv.chunk(2, 2)
    return forward_regions(attention, q, k, v, tile.is_diagonal, scale, tile.regions)


def backward_tile_inputs(tile: Tile, kv_CBKD: Sequence[Tensor], dkv_CBKD: Sequence[Tensor]) -> list[Tensor]:
    """Chunks a backward tile off the diagonal loads: keys and values, and their gradients if some are stored."""
    return [kv_CBKD[tile.key], *[dkv_CBKD[tile.key]] * (not tile.first_of_column)]


def attend_backward(
    attention: AttentionBackend,
    scale: float,
    row: list[Tile],
    queries: tuple[Tensor, ...],
    own: list[Tensor],
    store: ChunkStore,
    row_ahead: Prefetch,
    tile_ahead: Prefetch,
    dkv_CBKD: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One row of tiles: (dq, dkv) of the row's chunk, final, in the dtype of q; and dkv of the chunk before it.

    The gradients of the other chunks are stored. `queries` are q, o, do [C, B, H, D] and lse [B, H, C]; `own` is taken
    out: kv of the row's chunk, and its dkv where there is one; `tile_ahead` brings `backward_tile_inputs`.
    """
    diagonal, *others = row
    dtype = queries[0].dtype
    (tile_ahead if others else row_ahead).start()
    dq, dkv_row = _backward_tile(attention, scale, diagonal, queries, None, *_taken(own))
    dkv_row = dkv_row.to(dtype)
    dkv_before = None
    for tile in others:
        inputs = next(tile_ahead)
        # The last tile is the only one beside which no other is sent for: the next row's place.
        (row_ahead if tile is others[-1] else tile_ahead).start()
        dq, dkv_tile = _backward_tile(attention, scale, tile, queries, dq, *inputs)
        if tile is others[-1]:
            dkv_before = dkv_tile
        else:
            store.put(dkv_CBKD[tile.key], dkv_tile)
        del inputs, dkv_tile
    return dq.to(dtype), dkv_row, dkv_before


def _taken(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The tensors, none of which is referenced here any more."""
    while tensors:
        yield tensors.pop(0)


def _backward_tile(
    attention: AttentionBackend,
    scale: float,
    tile: Tile,
    queries: tuple[Tensor, ...],
    dq_sum: Tensor | None,
    kv: Tensor,
    dkv_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dq, dkv) of one tile, added to the sums where there are any."""
    q, o, do, lse = queries
    k, v = kv.chunk(2, 2)
    dq, dk, dv = backward_regions(attention, do, q, k, v, o, lse, tile.is_diagonal, scale, tile.regions)
    sum_dtype = accumulation_dtype(q.dtype)
    if dq_sum is None:
        dq_sum = dq.to(sum_dtype)
    else:
        add_(dq_sum, dq)
    if dkv_sum is None:
        dkv_sum = torch.cat([dk, dv], 2).to(sum_dtype)
    else:
        add_key_value_gradients_(dkv_sum, dk, dv)
    return dq_sum, dkv_sum
