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
from megatron.fpdt.store import Prefetch
from megatron.fpdt.stream import BACKWARD_RUNS_ONCE, GradientSum, Stream, accumulation_dtype
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
            raise RuntimeError(BACKWARD_RUNS_ONCE)
        x, positions = ctx.saved_tensors
        dx, dparameters = _backward(ctx.stream, ctx.block, x, positions, grads[0].contiguous(), kept, ctx.parameters)
        return dx, None, None, None, None, *dparameters


def _forward(stream: Stream, block: CausalBlock, x: Tensor, positions: Tensor, keep: bool) -> tuple[Tensor, _Kept]:
    store, layout = stream.store, stream.layout(x)
    y = store.empty(x.shape, x.dtype)
    xs, ys = (t.split(layout.local_lengths) for t in (x, y))
    chunk_positions = positions.split(layout.local_lengths, 1)
    kept = _Kept([], [], [], RandomStates(store.device, enabled=block.uses_dropout and keep))
    rows = ChunkPlan(layout.num_chunks).forward_rows()
    x_ahead = store.prefetch([xs[row[0].query]] for row in rows)
    kv_ahead = store.prefetch([kept.kv_CBKD[tile.key]] for row in rows for tile in row if not tile.is_diagonal)
    for row in rows:
        i = row[0].query
        stream.report("forward", block.layer_number, i, layout.num_chunks)
        store.put(ys[i], _forward_row(stream, block, layout, row, x_ahead, chunk_positions[i], kv_ahead, kept, keep))
    return y, kept


# What runs per row and per tile is a function of its own, so that nothing of the last one is referenced when the next
# chunk is sent for: the device holds the chunk in use and the one on its way.


def _forward_row(
    stream: Stream,
    block: CausalBlock,
    layout: SequenceLayout,
    row: list[Tile],
    x_ahead: Prefetch,
    positions: Tensor,
    kv_ahead: Prefetch,
    kept: _Kept,
    keep: bool,
) -> Tensor:
    """The block's output for one query chunk; what the backward pass needs goes to `kept`."""
    store, group, i = stream.store, stream.parallel_state.sequence_parallel_group, row[0].query
    (x,) = next(x_ahead)
    q, k, v = tokens_to_heads(_project(stream, block, x, positions), group)
    kv = torch.cat([k, v], 2)
    if i == 0:
        _allocate(kept, stream, layout, q, kv, keep)
    store.put(kept.kv_CBKD[i], kv)
    o_heads, lse = _attend(stream, block, row, q, kv, kv_ahead)
    (o,) = heads_to_tokens([o_heads], group)
    if keep:
        store.put(kept.o_cBHD[i], o)
        store.put(kept.lse_BHC[i], lse)
    kept.random_states.record()
    return torch.cat([block.after(x[s], o[s]) for s in stream.slices(len(x))])


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
    stream: Stream, block: CausalBlock, row: list[Tile], q: Tensor, kv: Tensor, kv_ahead: Prefetch
) -> tuple[Tensor, Tensor]:
    """One row of tiles: o [C, B, H, D] in the dtype of q, and lse [B, H, C]."""
    diagonal, *others = row
    o, lse = _forward_tile(stream, block, diagonal, q, kv)
    if others:
        o = o.to(accumulation_dtype(q.dtype))
    for tile in others:
        merge_(o, lse, *_forward_tile(stream, block, tile, q, *next(kv_ahead)))
    return o.to(q.dtype), lse


def _forward_tile(stream: Stream, block: CausalBlock, tile: Tile, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    k, v = kv.chunk(2, 2)
    return stream.attention.forward(q, k, v, tile.is_diagonal, block.softmax_scale)


def _backward(
    stream: Stream,
    block: CausalBlock,
    x: Tensor,
    positions: Tensor,
    dy: Tensor,
    kept: _Kept,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    store, layout = stream.store, stream.layout(x)
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
        with kept.random_states.replay(i):
            dx_i = _backward_row(
                stream, block, row, row_ahead, chunk_positions[i], tile_ahead, dkv, parameters, gradients
            )
        store.put(dxs[i], dx_i)
    return dx, gradients.result()


def _backward_row(
    stream: Stream,
    block: CausalBlock,
    row: list[Tile],
    row_ahead: Prefetch,
    positions: Tensor,
    tile_ahead: Prefetch,
    dkv: Sequence[Tensor],
    parameters: Sequence[Tensor],
    gradients: GradientSum,
) -> Tensor:
    """The gradient of the block's input for one query chunk; those of the parameters are added to `gradients`."""
    group = stream.parallel_state.sequence_parallel_group
    x, o, lse, dy = next(row_ahead)
    dx, do = _backward_after(stream, block, x, o, dy, parameters, gradients)
    with torch.enable_grad():
        x_leaf = x.detach().requires_grad_()
        projected = _project(stream, block, x_leaf, positions)
    q, k, v, o, do = tokens_to_heads([*(t.detach() for t in projected), o, do], group)
    dqkv = _backward_attend(stream, block, row, (q, k, v, o, do, lse), tile_ahead, dkv)
    dprojected = heads_to_tokens(dqkv, group)
    dx_before, *dparameters = torch.autograd.grad(projected, [x_leaf, *parameters], dprojected, allow_unused=True)
    gradients.add(dparameters)
    return dx.add_(dx_before)


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
    tile_ahead: Prefetch,
    dkv: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One row of tiles: (dq, dk, dv) of the row's chunk, final, in the dtype of q; dkv of the other chunks stored."""
    q = inputs[0]
    dq = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype))
    *others, diagonal = row
    for tile in others:
        stream.store.put(dkv[tile.key], _backward_tile(stream, block, tile, inputs, dq, *next(tile_ahead)))
    dkv_row = _backward_tile(stream, block, diagonal, inputs, dq, None, *next(tile_ahead))
    dk, dv = dkv_row.to(q.dtype).chunk(2, 2)
    return dq.to(q.dtype), dk, dv


def _backward_tile(
    stream: Stream,
    block: CausalBlock,
    tile: Tile,
    inputs: tuple[Tensor, ...],
    dq_sum: Tensor,
    kv: Tensor | None,
    dkv_sum: Tensor | None = None,
) -> Tensor:
    """Add the tile's dq to `dq_sum`; returns its dkv, added to `dkv_sum` where there is one.

    Without `kv` the keys and values are those of the row itself.
    """
    q, k, v, o, do, lse = inputs
    if kv is not None:
        k, v = kv.chunk(2, 2)
    dq, dk, dv = stream.attention.backward(do, q, k, v, o, lse, tile.is_diagonal, block.softmax_scale)
    dq_sum.add_(dq)
    dkv = torch.cat([dk, dv], 2)  # [C, B, K, D] -> [C, B, 2K, D]
    return dkv.to(accumulation_dtype(dkv.dtype)) if dkv_sum is None else dkv_sum.add_(dkv)
