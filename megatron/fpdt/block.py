"""One transformer block as a stream: forward and backward chunk by chunk, nothing of full length on the device.

Forward, for query chunk i ascending:

    copy-in            compute                                        communication         copy-out
    x[i+1]             q, kv = before(x[i])                           tokens -> heads       kv[i]
    kv[0], kv[1], ..   (o, lse) merged over tiles (i, j), j <= i
                       y[i] = sum of after(x[i], o)                   heads -> tokens       o[i], lse[i], y[i]

Backward, for query chunk i descending:

    copy-in            compute                                        communication         copy-out
                       dx, do, dW = vjp of after at (x[i], o[i])
                       q, kv = before(x[i]), graph kept               tokens -> heads
    kv[0], dkv[0]      dq, dkv from tile (i, i): dkv[i] now final
    kv[j], dkv[j]      dq, dkv from tile (i, j), j < i-1                                    dkv[j]
    x, o, lse, dy[i-1] dq, dkv from tile (i, i-1): dq[i] now final    heads -> tokens
                       dx, dW += vjp of before at (x[i])                                    dx[i]

Attention is never run again: its output and log-sum-exp are kept. What is recomputed is token-wise, up to the last
product of `after`, of which only the gradients are made; and the outputs of other linear layers may be kept too, on the
tier like the rest (megatron.fpdt.products). Those of a chunk's first slice are not: their place on the device would be
needed beside the tiles, while those of the next slices arrive behind the slice before. Keys and values are kept, or
made anew in one pass before the first row. `before` and `after` are ordinary differentiable methods of the block; what
they compute is their own business.

    S tokens of the sequence, c and C of one chunk (this rank's and all ranks'), B batch, h hidden size,
    H query heads, K key/value heads, D head size
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.core.collectives import QUERIES_KEYS_VALUES, Exchange
from megatron.core.documents import Documents
from megatron.core.ranges import ATTENTION, TOKEN_WISE, named_range
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.attention_tiles import attend, attend_backward, backward_tile_inputs
from megatron.fpdt.block_inputs import BlockInputs
from megatron.fpdt.plan import ChunkPlan, Tile, chunk_plan
from megatron.fpdt.products import Products
from megatron.fpdt.projection import make_keys_and_values, project
from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.store import Prefetch
from megatron.fpdt.stream import (
    ATTENTION_OUTPUT,
    BACKWARD_RUNS_ONCE,
    INPUT,
    OUTPUT,
    PROJECTED,
    CausalBlock,
    GradientSums,
    Stream,
)
from megatron.ops.gradient_sum import accumulation_dtype


def stream_block(
    stream: Stream, block: CausalBlock, x_SBh: Tensor, positions_BS: Tensor, documents: Documents | None = None
) -> Tensor:
    """Run one block. x [S/p, B, h] and the result rest on the stream's tier and hold this rank's tokens.

    A token attends to its own document where `documents` says which there are in the sequences of all S tokens.
    Collective over the sequence-parallel group: every rank calls it for the same block; its backward pass too.
    """
    parameters = [p for p in block.parameters() if p.requires_grad]
    return _StreamedBlock.apply(x_SBh, positions_BS, documents, stream, block, torch.is_grad_enabled(), *parameters)


@dataclass
class _Kept:
    """What the forward pass leaves for the backward pass: chunks on the tier."""

    input_is_on_device: bool
    random_states: RandomStates
    before: Products
    after: Products
    o_cBHD: Sequence[Tensor] = ()  # this rank's tokens, all heads
    lse_BHC: Sequence[Tensor] = ()  # all tokens of the chunk, this rank's heads
    kv_CBKD: Sequence[Tensor] = ()  # likewise; K keys, then K values; empty where they are made anew
    kv_shape: Sequence[int] = ()  # of all chunks of kv together
    inputs: BlockInputs | None = None  # the block's input is the one at `position`
    position: int = 0
    first_loads: Sequence[Tensor] = ()  # what the backward pass begins with
    below: Callable[[], _Kept | None] = lambda: None  # what the block below has kept


class _StreamedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        positions: Tensor,
        documents: Documents | None,
        stream: Stream,
        block: CausalBlock,
        keep: bool,
        *parameters: Tensor,
    ) -> Tensor:
        plan = chunk_plan(tuple(stream.layout(x).chunk_lengths), documents)
        y, kept = _forward(stream, block, plan, x, positions, keep)
        if keep:
            # An input that is kept is kept by autograd too, which notices if it is written to.
            ctx.save_for_backward(positions, *[x] * (kept.position == 0))
            ctx.stream, ctx.block, ctx.plan, ctx.kept, ctx.parameters = stream, block, plan, kept, parameters
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise RuntimeError(BACKWARD_RUNS_ONCE)
        positions, *_ = ctx.saved_tensors
        dy, parameters = grads[0].contiguous(), ctx.parameters
        dx, dparameters = _backward(ctx.stream, ctx.block, ctx.plan, positions, dy, kept, parameters)
        return dx, None, None, None, None, None, *dparameters


def _forward(
    stream: Stream, block: CausalBlock, plan: ChunkPlan, x: Tensor, positions: Tensor, keep: bool
) -> tuple[Tensor, _Kept]:
    store, layout = stream.store, stream.layout(x)
    y = store.empty(x.shape, x.dtype)
    xs, ys = (t.split(layout.local_lengths) for t in (x, y))
    chunk_positions = positions.split(layout.local_lengths, 1)
    random_states = RandomStates(store.device, enabled=block.uses_dropout and keep)
    before, after = block.weights_of_kept_products(stream.recompute if keep else "all")
    kept = _Kept(store.is_on_device(x), random_states, Products(store, before), Products(store, after))
    rows = plan.forward_rows()
    x_ahead = store.prefetch([t[row[0].query] for t in (xs, chunk_positions)] for row in rows)
    tiles = (tile for row in rows for tile in row if not tile.is_diagonal)
    kv_ahead = store.prefetch(([kept.kv_CBKD[tile.key]] for tile in tiles), ahead=False)
    started = stream.started_ahead(_start_forward_row(stream, block, row[0].query, x_ahead, kept) for row in rows)
    for row in rows:
        i = row[0].query
        with stream.piece("forward", block.layer_number, i, layout.num_chunks):
            if row is rows[-1]:
                store.expect(ys[:i][:1])  # the block above begins with it
            store.put(ys[i], _finish_forward_row(stream, block, layout, row, next(started), kv_ahead, kept, keep))
    if keep:
        loaded_first = -1
        if stream.recompute == "kv":
            kept.kv_CBKD = ()
            loaded_first = next(iter(plan.loaded_keys()), -1)
        _link(kept, stream, block, x, y, xs[loaded_first])
    return y, kept


def _link(kept: _Kept, stream: Stream, block: CausalBlock, x: Tensor, y: Tensor, first_load: Tensor) -> None:
    """Join the block to the chain of those whose inputs are rebuilt together, and to the block below."""
    inputs = stream.block_inputs()
    if inputs is None or len(inputs) == stream.checkpoint_interval or not inputs.ends_with(x):
        inputs = BlockInputs(stream, x)
        stream.block_inputs = weakref.ref(inputs)
    kept.inputs, kept.position = inputs, len(inputs)
    inputs.append(block, kept.o_cBHD, kept.random_states, y)
    kept.first_loads = [first_load] * (kept.position == 0) + [kept.o_cBHD[-1], kept.lse_BHC[-1]]
    kept.below, stream.block_below = stream.block_below, weakref.ref(kept)


# What runs per row is a function of its own, so that nothing of the last one is referenced when the next
# chunk is sent for: the device holds the chunk in use and the one on its way.


@dataclass
class _StartedForwardRow:
    """A query chunk that is projected, and on its way from tokens to heads."""

    x: Tensor
    exchange: Exchange


def _start_forward_row(
    stream: Stream, block: CausalBlock, chunk: int, x_ahead: Prefetch, kept: _Kept
) -> _StartedForwardRow:
    x, positions = next(x_ahead)
    with kept.before.kept(chunk):
        projected = project(stream, block, x, positions)
    for what, value in zip(PROJECTED, projected, strict=True):
        stream.note("forward", what, block.layer_number, chunk, value)
    return _StartedForwardRow(x, stream.start_tokens_to_heads(projected, QUERIES_KEYS_VALUES))


def _finish_forward_row(
    stream: Stream,
    block: CausalBlock,
    layout: SequenceLayout,
    row: list[Tile],
    started: _StartedForwardRow,
    kv_ahead: Prefetch,
    kept: _Kept,
    keep: bool,
) -> Tensor:
    """The block's output for one query chunk; what the backward pass needs goes to `kept`."""
    store, i = stream.store, row[0].query
    x, (q, kv) = started.x, started.exchange()
    if i == 0:
        _allocate(kept, stream, layout, q, kv, keep)
    store.put(kept.kv_CBKD[i], kv)
    with named_range(ATTENTION):
        o_heads, lse = attend(stream.attention, block.softmax_scale, row, q, kv, kv_ahead)
    stream.note("forward", ATTENTION_OUTPUT, block.layer_number, i, o_heads)
    store.let_go()  # what the row before has left, gone by now
    (o,) = stream.heads_to_tokens([o_heads])
    if keep:
        store.put(kept.o_cBHD[i], o)
        store.put(kept.lse_BHC[i], lse)
    kept.random_states.record()
    y = stream.output(block, x, o, partial(kept.after.kept, i))
    return stream.noted("forward", OUTPUT, block.layer_number, i, y)


def _allocate(kept: _Kept, stream: Stream, layout: SequenceLayout, q_CBHD: Tensor, kv_CBKD: Tensor, keep: bool) -> None:
    _, B, H, D = q_CBHD.shape
    store, dtype, lengths = stream.store, q_CBHD.dtype, layout.chunk_lengths
    kept.kv_shape = (layout.sequence_length, *kv_CBKD.shape[1:])
    kept.kv_CBKD = store.empty(kept.kv_shape, dtype).split(lengths)
    if keep:
        all_heads = H * stream.parallel_state.sequence_parallel_size
        kept.o_cBHD = store.empty((layout.local_length, B, all_heads, D), dtype).split(layout.local_lengths)
        flat = store.empty((layout.sequence_length * B * H,), accumulation_dtype(dtype))
        kept.lse_BHC = [part.view(B, H, -1) for part in flat.split([length * B * H for length in lengths])]


def _backward(
    stream: Stream,
    block: CausalBlock,
    plan: ChunkPlan,
    positions: Tensor,
    dy: Tensor,
    kept: _Kept,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    assert kept.inputs is not None
    x = kept.inputs.take(kept.position)
    store, layout = stream.store, stream.layout(x)
    dx = store.empty(x.shape, x.dtype, kept.input_is_on_device)
    xs, dxs, dys = (t.split(layout.local_lengths) for t in (x, dx, dy))
    chunk_positions = positions.split(layout.local_lengths, 1)
    dkv = store.empty(kept.kv_shape, accumulation_dtype(x.dtype)).split(layout.chunk_lengths)
    if not kept.kv_CBKD:
        kept.kv_CBKD = store.empty(kept.kv_shape, x.dtype).split(layout.chunk_lengths)
        make_keys_and_values(stream, block, plan.loaded_keys(), xs, chunk_positions, kept.kv_CBKD)
    gradients = GradientSums(parameters)
    rows = plan.backward_rows()
    chunks = [row[0].query for row in rows]
    per_row = (xs, chunk_positions, kept.o_cBHD, kept.lse_BHC, dys)
    row_inputs = ([t[i] for t in per_row] for i in chunks)
    row_ahead = store.prefetch(row_inputs, ahead=False)
    tiles = (tile for row in rows for tile in row if not tile.is_diagonal)
    tile_inputs = (backward_tile_inputs(tile, kept.kv_CBKD, dkv) for tile in tiles)
    tile_ahead = store.prefetch(tile_inputs, ahead=False)
    calls = (call for i in chunks for call in (*kept.after.calls(i), *kept.before.calls(i)))
    products_ahead = store.prefetch(calls, ahead=False)
    started = stream.started_ahead(
        _start_backward_row(stream, block, i, row_ahead, products_ahead, kept, gradients) for i in chunks
    )
    row_ahead.start()
    own_dkv: list[Tensor] = []  # what the rows before have added for the row's own chunk
    for row in rows:
        i = row[0].query
        with stream.piece("backward", block.layer_number, i, layout.num_chunks):
            if row is rows[-1] and (below := kept.below()) is not None:
                store.expect([*below.first_loads, *dxs[i + 1 :][-1:]])  # the block below begins with them
            ahead = row_ahead, tile_ahead
            store.put(dxs[i], _finish_backward_row(stream, block, row, next(started), own_dkv, ahead, dkv, gradients))
    return dx, gradients.result()


@dataclass
class _StartedBackwardRow:
    """A query chunk whose `after` is differentiated and which is projected, on its way from tokens to heads."""

    x: Tensor  # the leaf of the graph of `projected`
    dx: Tensor
    lse: Tensor
    projected: tuple[GradientEdge, GradientEdge]
    exchange: Exchange


def _start_backward_row(
    stream: Stream,
    block: CausalBlock,
    chunk: int,
    row_ahead: Prefetch,
    products_ahead: Prefetch,
    kept: _Kept,
    gradients: GradientSums,
) -> _StartedBackwardRow:
    x, positions, o, lse, dy = next(row_ahead)
    if stream.starts_rows_ahead and chunk == len(kept.o_cBHD) - 1:
        row_ahead.start()  # the second row is started next, with no attention before it to hide its copies
    products_ahead.start()
    with gradients.collecting():
        with kept.random_states.replay(chunk), named_range(TOKEN_WISE):
            dx, do = _backward_after(stream, block, x, o, dy, products_ahead, kept.after, gradients)
        del dy
        stream.note("backward", ATTENTION_OUTPUT, block.layer_number, chunk, do)
        with torch.enable_grad(), kept.before.given([*next(products_ahead)]):
            x = x.detach().requires_grad_()
            projected = project(stream, block, x, positions)
    sent = [*(t.detach() for t in projected), o, do]
    q, kv = (get_gradient_edge(t) for t in projected)  # which do not hold the tensors
    return _StartedBackwardRow(x, dx, lse, (q, kv), stream.start_tokens_to_heads(sent, (*QUERIES_KEYS_VALUES, 1, 1)))


def _finish_backward_row(
    stream: Stream,
    block: CausalBlock,
    row: list[Tile],
    started: _StartedBackwardRow,
    own_dkv: list[Tensor],
    ahead: tuple[Prefetch, Prefetch],
    dkv: Sequence[Tensor],
    gradients: GradientSums,
) -> Tensor:
    """The gradient of the block's input for one query chunk; those of the parameters are added to `gradients`.

    `own_dkv` holds the sum for the row's own keys and values, and then that for those of the next row.
    """
    stream.store.let_go()  # the dx of the row before, gone by now
    q, kv, o, do = started.exchange()
    queries, own = (q, o, do, started.lse), [kv, *own_dkv]
    own_dkv.clear()
    del kv, started.exchange  # `own` alone holds kv now, and loses it to the first tile
    with named_range(ATTENTION):
        dq, dkv_row, dkv_before = attend_backward(
            stream.attention, block.softmax_scale, row, queries, own, stream.store, *ahead, dkv
        )
    for what, value in zip(PROJECTED, (dq, dkv_row), strict=True):
        stream.note("backward", what, block.layer_number, row[0].query, value)
    own_dkv.extend([] if dkv_before is None else [dkv_before])
    dprojected = stream.heads_to_tokens((dq, dkv_row), QUERIES_KEYS_VALUES)
    with named_range(TOKEN_WISE):
        dx_before, *dparameters = torch.autograd.grad(
            started.projected, [started.x, *gradients.parameters], dprojected, allow_unused=True
        )
    gradients.add(dparameters)
    return stream.noted("backward", INPUT, block.layer_number, row[0].query, started.dx.add_(dx_before))


def _backward_after(
    stream: Stream,
    block: CausalBlock,
    x: Tensor,
    o: Tensor,
    dy: Tensor,
    products_ahead: Prefetch,
    products: Products,
    gradients: GradientSums,
) -> tuple[Tensor, Tensor]:
    """Vector-Jacobian product of `after`, slice by slice: (dx, do) of the chunk."""
    dx, do = torch.empty_like(x), torch.empty_like(o)
    for s in stream.slices(len(x)):
        outputs = []
        if s.start:
            outputs = [*next(products_ahead)]
            products_ahead.start()
        with torch.enable_grad(), products.given(outputs):
            x_leaf, o_leaf = (t[s].detach().requires_grad_() for t in (x, o))
            addends = block.after(x_leaf, o_leaf, output_needed=False)
        dx[s], do[s], *dparameters = torch.autograd.grad(
            addends, [x_leaf, o_leaf, *gradients.parameters], [dy[s]] * len(addends), allow_unused=True
        )
        gradients.add(dparameters)
    return dx, do
