"""One transformer block as a stream: forward and backward chunk by chunk, nothing of full length on the device.

Forward, for query chunk i ascending:

    copy-in            compute                                        communication         copy-out
    x[i+1]             q, k, v = before(x[i])                         tokens -> heads       kv[i]
    kv[0], kv[1], ..   (o, lse) merged over tiles (i, j), j <= i
                       y[i] = after(x[i], o)                          heads -> tokens       o[i], lse[i], y[i]

Backward, for query chunk i descending:

    copy-in            compute                                        communication         copy-out
    x, o, lse, dy[i-1] dx, do, dW = vjp of after at (x[i], o[i])
                       q, k, v = before(x[i]), graph kept             tokens -> heads
    kv[j], dkv[j]      dq, dk, dv from tile (i, j), j < i                                   dkv[j]
    dkv[i]             dq, dk, dv from tile (i, i): all now final     heads -> tokens
                       dx, dW += vjp of before at (x[i])                                    dx[i]

Attention is never run again: its output and log-sum-exp are kept. What is recomputed is token-wise. `before` and
`after` are ordinary differentiable methods of the block; what they compute is their own business.

    S tokens of the sequence, c and C of one chunk (this rank's and all ranks'), B batch, h hidden size,
    H query heads, K key/value heads, D head size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.core.collectives import heads_to_tokens, repeat_key_value_heads, tokens_to_heads
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.plan import ChunkPlan, Tile
from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.stream import GradientSum, Stream, accumulation_dtype
from megatron.ops.merge import merge_


class CausalBlock(Protocol):
    """What a module must be to be streamed."""

    layer_number: int
    softmax_scale: float

    @property
    def uses_dropout(self) -> bool:
        """Whether `after` draws random numbers now."""
        ...

    def before(self, x_SBh: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token-wise: q [S, B, H, D], k and v [S, B, K, D]."""
        ...

    def after(self, x_SBh: Tensor, o_SBHD: Tensor) -> Tensor:
        """Token-wise: the block's output [S, B, h]."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def stream_block(stream: Stream, block: CausalBlock, x_SBh: Tensor, positions_BS: Tensor) -> Tensor:
    """Run one block. x [S/p, B, h] and the result rest on the stream's tier and hold this rank's tokens.

    Collective over the sequence-parallel group: every rank calls it for the same block; its backward pass too.
    """
    parameters = [p for p in block.parameters() if p.requires_grad]
    return _StreamedBlock.apply(x_SBh, positions_BS, stream, block, torch.is_grad_enabled(), *parameters)


@dataclass
class _Kept:
    """What the forward pass leaves for the backward pass: chunks on the tier."""

    o_cBHD: Sequence[Tensor]  # this rank's tokens, all heads
    lse_BHC: Sequence[Tensor]  # all tokens of the chunk, this rank's heads
    kv_CBKD: Sequence[Tensor]  # likewise; K keys, then K values
    random_states: RandomStates


class _StreamedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor, stream: Stream, block: CausalBlock, keep: bool, *parameters: Tensor
    ) -> Tensor:
        y, kept = _forward(stream, block, x, positions, keep)
        if keep:
            ctx.save_for_backward(x, positions)
            ctx.stream, ctx.block, ctx.kept, ctx.parameters = stream, block, kept, parameters
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise RuntimeError(
                "the backward pass of a streamed block runs once: its chunks are gone, and retain_graph has no effect"
            )
        x, positions = ctx.saved_tensors
        dx, dparameters = _backward(ctx.stream, ctx.block, x, positions, grads[0].contiguous(), kept, ctx.parameters)
        return dx, None, None, None, None, *dparameters


def _forward(stream: Stream, block: CausalBlock, x: Tensor, positions: Tensor, keep: bool) -> tuple[Tensor, _Kept]:
    store, group, layout = stream.store, stream.parallel_state.sequence_parallel_group, stream.layout(x)
    y = store.empty(x.shape, x.dtype)
    xs, ys, chunk_positions = (
        *(t.split(layout.local_lengths) for t in (x, y)),
        positions.split(layout.local_lengths, 1),
    )
    kept = _Kept([], [], [], RandomStates(store.device, enabled=block.uses_dropout and keep))
    rows = ChunkPlan(layout.num_chunks).forward_rows()
    x_ahead = store.prefetch([xs[row[0].query]] for row in rows)
    kv_ahead = store.prefetch([kept.kv_CBKD[tile.key]] for row in rows for tile in row if not tile.is_diagonal)

    for row in rows:
        i = row[0].query
        stream.report("forward", block.layer_number, i, layout.num_chunks)
        (x_i,) = next(x_ahead)
        q, k, v = tokens_to_heads(_project(stream, block, x_i, chunk_positions[i]), group)
        kv = torch.cat([k, v], 2)
        if i == 0:
            _allocate(kept, stream, layout, q, kv, keep)
        store.put(kept.kv_CBKD[i], kv)
        o, lse = _attend(stream, block, row, q, kv, kv_ahead)
        (o_i,) = heads_to_tokens([o], group)
        if keep:
            store.put(kept.o_cBHD[i], o_i)
            store.put(kept.lse_BHC[i], lse)
        kept.random_states.record()
        store.put(ys[i], torch.cat([block.after(x_i[s], o_i[s]) for s in stream.slices(len(x_i))]))
    return y, kept


def _project(stream: Stream, block: CausalBlock, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.before(x, stream.on_device(positions))
    size = stream.parallel_state.sequence_parallel_size
    return q, repeat_key_value_heads(k, size), repeat_key_value_heads(v, size)


def _allocate(kept: _Kept, stream: Stream, layout: SequenceLayout, q_CBHD: Tensor, kv_CBKD: Tensor, keep: bool) -> None:
    _, B, H, D = q_CBHD.shape
    store, dtype, lengths = stream.store, q_CBHD.dtype, layout.chunk_lengths
    kept.kv_CBKD = store.empty((layout.sequence_length, *kv_CBKD.shape[1:]), dtype).split(lengths)
    if keep:
        all_heads = H * stream.parallel_state.sequence_parallel_size
        kept.o_cBHD = store.empty((layout.local_length, B, all_heads, D), dtype).split(layout.local_lengths)
        flat = store.empty((layout.sequence_length * B * H,), accumulation_dtype(dtype))
        kept.lse_BHC = [part.view(B, H, -1) for part in flat.split([length * B * H for length in lengths])]


def _attend(
    stream: Stream, block: CausalBlock, row: list[Tile], q: Tensor, kv: Tensor, kv_ahead: Iterator[tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """One row of tiles: o [C, B, H, D] in the dtype of q, and lse [B, H, C]."""
    o, lse = None, None
    for tile in row:
        k, v = (kv if tile.is_diagonal else next(kv_ahead)[0]).chunk(2, 2)
        o_tile, lse_tile = stream.attention.forward(q, k, v, tile.is_diagonal, block.softmax_scale)
        if o is None or lse is None:
            o, lse = o_tile, lse_tile
        else:
            o = o.to(accumulation_dtype(q.dtype))
            merge_(o, lse, o_tile, lse_tile)
    if o is None or lse is None:
        raise AssertionError("a causal row has at least its diagonal")
    return o.to(q.dtype), lse


def _backward(
    stream: Stream,
    block: CausalBlock,
    x: Tensor,
    positions: Tensor,
    dy: Tensor,
    kept: _Kept,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    store, group, layout = stream.store, stream.parallel_state.sequence_parallel_group, stream.layout(x)
    dx = store.empty(x.shape, x.dtype)
    xs, dxs, dys = (t.split(layout.local_lengths) for t in (x, dx, dy))
    chunk_positions = positions.split(layout.local_lengths, 1)
    kv_shape = (layout.sequence_length, *kept.kv_CBKD[0].shape[1:])
    dkv = store.empty(kv_shape, accumulation_dtype(x.dtype)).split(layout.chunk_lengths)
    gradients = GradientSum(parameters)
    rows = ChunkPlan(layout.num_chunks).backward_rows()
    row_ahead = store.prefetch([t[row[0].query] for t in (xs, kept.o_cBHD, kept.lse_BHC, dys)] for row in rows)
    tile_ahead = store.prefetch(_tile_inputs(tile, kept.kv_CBKD, dkv) for row in rows for tile in row)

    for row in rows:
        i = row[0].query
        stream.report("backward", block.layer_number, i, layout.num_chunks)
        x_i, o_i, lse, dy_i = next(row_ahead)
        with kept.random_states.replay(i):
            dx_i, do_i = _backward_after(stream, block, x_i, o_i, dy_i, parameters, gradients)
        with torch.enable_grad():
            x_leaf = x_i.detach().requires_grad_()
            projected = _project(stream, block, x_leaf, chunk_positions[i])
        q, k, v, o, do = tokens_to_heads([*(t.detach() for t in projected), o_i, do_i], group)
        dqkv = _backward_attend(stream, block, row, (q, k, v, o, do, lse), tile_ahead, dkv)
        dprojected = heads_to_tokens(dqkv, group)
        dx_before, *dparameters = torch.autograd.grad(projected, [x_leaf, *parameters], dprojected, allow_unused=True)
        gradients.add(dparameters)
        store.put(dxs[i], dx_i + dx_before)
    return dx, gradients.result()


def _tile_inputs(tile: Tile, kv: Sequence[Tensor], dkv: Sequence[Tensor]) -> list[Tensor]:
    """Chunks a backward tile loads: keys and values unless it has just projected them, gradients if some are stored."""
    return [kv[tile.key]] * (not tile.is_diagonal) + [dkv[tile.key]] * (not tile.first_of_column)


def _backward_after(
    stream: Stream,
    block: CausalBlock,
    x: Tensor,
    o: Tensor,
    dy: Tensor,
    parameters: Sequence[Tensor],
    gradients: GradientSum,
) -> tuple[Tensor, Tensor]:
    """Vector-Jacobian product of `after`, slice by slice: (dx, do) of the chunk."""
    dx, do = torch.empty_like(x), torch.empty_like(o)
    for s in stream.slices(len(x)):
        with torch.enable_grad():
            leaves = [t[s].detach().requires_grad_() for t in (x, o)]
            y = block.after(*leaves)
        dx[s], do[s], *dparameters = torch.autograd.grad(y, [*leaves, *parameters], dy[s], allow_unused=True)
        gradients.add(dparameters)
    return dx, do


def _backward_attend(
    stream: Stream,
    block: CausalBlock,
    row: list[Tile],
    inputs: tuple[Tensor, ...],
    tile_ahead: Iterator[tuple[Tensor, ...]],
    dkv: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One row of tiles: (dq, dk, dv) of the row's chunk, final, in the dtype of q; dkv of the other chunks stored."""
    q, k_row, v_row, o, do, lse = inputs
    dq_row, dkv_tile = None, None
    for tile in row:
        loaded = list(next(tile_ahead))
        k, v = (k_row, v_row) if tile.is_diagonal else loaded.pop(0).chunk(2, 2)
        dq, dk, dv = stream.attention.backward(do, q, k, v, o, lse, tile.is_diagonal, block.softmax_scale)
        dq_row = dq.to(accumulation_dtype(dq.dtype)) if dq_row is None else dq_row.add_(dq)
        dkv_tile = torch.cat([dk, dv], 2)  # [C, B, K, D] -> [C, B, 2K, D]
        dkv_tile = loaded[0].add_(dkv_tile) if loaded else dkv_tile.to(accumulation_dtype(dk.dtype))
        if not tile.is_diagonal:
            stream.store.put(dkv[tile.key], dkv_tile)
    if dq_row is None or dkv_tile is None:
        raise AssertionError("a causal row has at least its diagonal")
    dk_row, dv_row = dkv_tile.to(q.dtype).chunk(2, 2)
    return dq_row.to(q.dtype), dk_row, dv_row
