"""Backward pass of a streamed block. For query chunk i descending:

    copy-in            compute                                        communication         copy-out
                       layer(x[i]) with o[i]: y
                       dx, do, dW = vjp of y at (x[i], o[i])
                       layer(x[i]) up to its attention call: q, kv    tokens -> heads
    kv[0], dkv[0]      dq, dkv from tile (i, i): dkv[i] now final
    kv[j], dkv[j]      dq, dkv from tile (i, j), j < i-1                                    dkv[j]
    x, o, lse, dy[i-1] dq, dkv from tile (i, i-1): dq[i] now final    heads -> tokens
                       dx, dW += vjp of q, kv at x[i]                                       dx[i]

A row has three stages: start, attend, finish, as in the forward pass (megatron.fpdt.forward_pass), in the same order.

The layer runs slice by slice, twice. The first run takes the saved attention output and gives the gradients of y. The
second run stops at the attention call and gives q and kv; its graph is held until the tiles are done. One run serves
both if the chunk is one slice; else the graphs of the first slices would use device memory during the MLP of the last.
Only element-wise work runs twice: products whose values nobody reads are skipped. Products whose outputs were saved are
replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.core.collectives import QUERIES_KEYS_VALUES, Exchange, SharesToTokens
from megatron.core.ranges import ATTENTION, TOKEN_WISE, named_range
from megatron.fpdt.attention_tiles import BackwardTiles, QueryChunk, TileRow
from megatron.fpdt.block_chain import ChainedBlock
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.observer import ATTENTION_OUTPUT, INPUT, PROJECTED
from megatron.fpdt.plan import Tile
from megatron.fpdt.seam import AttentionCall
from megatron.fpdt.store import Prefetch
from megatron.fpdt.streamed_layer import SliceKey, StreamedLayer, joined, random_key
from megatron.ops.attention import AttentionOutput, AttentionVariant
from megatron.ops.gradient_sum import GradientSum, GradientSums
from megatron.ops.linear import LinearTape
from megatron.ops.merge import sink_gradients

# Takes a slice's x, with which its graph begins, and its attention call.
Project = Callable[[Tensor, AttentionCall], None]


class _Filled:
    """Tensors of one chunk, filled slice by slice. A slice that is the whole chunk is taken as it is."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._chunks: list[Tensor] = []

    def add(self, s: slice, parts: Sequence[Tensor]) -> None:
        """Copy one slice of each tensor. It may be released before the next is computed."""
        if len(parts[0]) == self._num_tokens:
            self._chunks = list(parts)
            return
        if not self._chunks:
            self._chunks = [part.new_empty((self._num_tokens, *part.shape[1:])) for part in parts]
        for chunk, part in zip(self._chunks, parts, strict=True):
            chunk[s] = part

    def take(self) -> list[Tensor]:
        """Return the chunks, and hold them no longer."""
        chunks, self._chunks = self._chunks, []
        return chunks


class _Projections:
    """q and kv of a chunk, and the autograd graph of each slice that ends with q, kv and the sinks."""

    variant: AttentionVariant  # of every slice
    sinks: Tensor | None = None  # of every slice, if they have a gradient

    def __init__(self, num_tokens: int) -> None:
        self.graphs: list[tuple[slice, Tensor, list[GradientEdge]]] = []
        self._chunks = _Filled(num_tokens)

    def add(self, s: slice, x: Tensor, call: AttentionCall) -> None:
        """Add the attention call of a slice, whose graph begins at x."""
        q, kv, self.variant, sinks = call
        outputs = [q, kv]
        if sinks is not None and sinks.requires_grad:
            outputs, self.sinks = [q, kv, sinks], sinks.detach()
        self.graphs.append((s, x, [get_gradient_edge(output) for output in outputs]))
        self._chunks.add(s, (q.detach(), kv.detach()))

    def take(self) -> list[Tensor]:
        """Return q and kv of the whole chunk, and hold them no longer."""
        return self._chunks.take()


@dataclass
class _StartedRow:
    """A query chunk whose gradients reach attention, and its all-to-alls in progress.

    They are those of the shares of its heads, then the one back to tokens.
    """

    dx: Tensor  # without the contribution through attention
    projections: _Projections
    lse: Tensor  # until its tiles have run
    exchanges: list[Exchange]


class BackwardPass:
    """The backward pass of one block on one sequence."""

    def __init__(self, layer: StreamedLayer, block: ChainedBlock, dy_SBh: Tensor, parameters: Sequence[Tensor]) -> None:
        self._layer, self._stream, self._store = layer, layer.stream, layer.stream.store
        self._block, self._gradients = block, GradientSums(parameters)
        self._recompute = self._stream.saving(dy_SBh).recompute
        store, self._layout = self._store, self._stream.layout(dy_SBh)
        lengths = self._layout.local_lengths
        dys = dy_SBh.split(lengths)
        x, saved = block.take(dys[-1:])
        self._saved = saved
        below = block.below()
        store.read_ahead([*saved.loads(x.split(lengths)), *(() if below is None else below.loads())])
        self._dx = store.empty(x.shape, x.dtype, ChunkKind.HIDDEN_GRADIENTS, block.input_is_on_device)
        self._xs, self._positions = x.split(lengths), saved.positions_BS.split(lengths, 1)
        self._kv = self._recomputed_keys_and_values() if saved.kv_CBKD is None else saved.kv_CBKD
        self._own_dkv: list[Tensor] = []  # dkv summed so far for the next row's own chunk
        self._own_dsinks = GradientSum()  # of this rank's heads
        self._finished: list[Tensor] = []  # chunks of dx, those of the last row first
        rows = saved.plan.backward_rows()
        chunks = [row[0].query for row in rows]
        # The generators reference no `self`: a cycle would hold chunks until garbage is collected.
        per_row = (self._xs, self._positions, saved.o_cBHD, saved.lse_BHC, dys)
        row_inputs = ([t[i] for t in per_row] for i in chunks)
        self._row_ahead = store.prefetch(row_inputs, ahead=False)
        self._tiles = BackwardTiles(store, saved.plan, self._kv)
        before = {i: [product for products in saved.products_before[i] for product in products] for i in chunks}
        groups = (group for i in chunks for group in (*saved.products_after[i][1:], before[i]))
        self._products_ahead = store.prefetch(groups, ahead=False)

    def run(self) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of the block's input, on the tier, and of the parameters."""
        saved, dxs = self._saved, self._dx.split(self._layout.local_lengths)
        rows = saved.plan.backward_rows()
        started = self._stream.one_row_ahead(self._start_row(row[0].query) for row in rows)
        attended: Iterator[_StartedRow] = (self._attend_row(row, next(started)) for row in rows)
        # The block below begins with the chunk of dx that is finished first. Of two rows, the first is finished before
        # the tiles of the second if they have to hide the chunk's way to the host and back.
        if len(rows) != 2 or self._store.is_on_device(self._dx):
            attended = self._stream.one_row_ahead(attended)
        self._row_ahead.start()
        for row in rows:
            i = row[0].query
            with self._stream.chunk("backward", self._layer.layer_number, i):
                if row is rows[-1]:
                    self._expect_first_loads_below()
                self._store.put(dxs[i], self._finish_row(i, next(attended)))
                self._finished.append(dxs[i])
        return self._dx, self._gradients.result()

    def _expect_first_loads_below(self) -> None:
        """Prefetch the chunks that the block below begins with, as far as they are finished."""
        if (below := self._block.below()) is not None:
            self._store.expect(below.first_loads(self._finished[:1]))

    # One function per stage of a row, as in the forward pass: its locals die on return.

    def _start_row(self, chunk: int) -> _StartedRow:
        x, positions, o, lse, dy = next(self._row_ahead)
        if self._stream.overlaps_rows and chunk == len(self._saved.o_cBHD) - 1:
            self._row_ahead.start()  # the second row starts next, with no attention in between to overlap with
        self._products_ahead.start()
        gradients, projections = _Filled(len(x)), _Projections(len(x))
        slices = [*self._stream.numbered_slices(x)]
        runs_once = len(slices) == 1
        for number, s in slices:
            products = [] if number else [*self._saved.products_after[chunk][0]]
            products += next(self._products_ahead) if number or runs_once else ()
            if number:
                self._products_ahead.start()
            project = partial(projections.add, s) if runs_once else None
            inputs = x[s], positions[:, s], o[s], dy[s]
            gradients.add(s, self._output_gradients((chunk, number), inputs, products, project))
        del dy, inputs
        dx, do = gradients.take()
        if not runs_once:
            products = [*next(self._products_ahead)]
            for number, s in slices:
                self._project((chunk, number), x[s], positions[:, s], products, partial(projections.add, s))
        self._stream.observer.note("backward", ATTENTION_OUTPUT, self._layer.layer_number, chunk, do)
        sent, parts = [*projections.take(), o, do], (*QUERIES_KEYS_VALUES, 1, 1)
        num_shares = self._stream.num_head_shares(len(self._saved.o_cBHD), len(x))
        return _StartedRow(dx, projections, lse, self._stream.start_tokens_to_heads(sent, parts, num_shares))

    def _output_gradients(
        self, key: SliceKey, inputs: tuple[Tensor, ...], products: list[Tensor], project: Project | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (dx, do) of a slice, without the gradient that reaches x through attention.

        The run replays and releases `products`. With `project`, it also gives q and kv.
        """
        trace, states, recompute = self._saved.trace, self._saved.random_states, self._recompute
        chunk, number = key
        numbers = trace.saved_after(recompute) if self._saved.products_after[chunk][number] else ()
        if project is not None:
            numbers += trace.saved_before(recompute)
        replayed = {number: products.pop(0) for number in numbers}
        skipped = trace.skipped if project is None else trace.skipped_after
        tape = LinearTape(replayed=replayed, skipped=skipped, sums=self._gradients)
        del replayed
        x, positions, o, dy = inputs
        x, o = (t.detach().requires_grad_() for t in (x, o))

        def attend(call: AttentionCall) -> Tensor:
            if project is not None:
                project(x, call._replace(kv_cBKD=self._layer.repeated_heads(call.kv_cBKD)))
            states.continue_with(random_key(key, "after"))
            return o

        with torch.enable_grad(), states.replay(random_key(key, "before")), named_range(TOKEN_WISE):
            y = self._layer.run(x, positions, tape, attend)
        trace.check(tape)
        y_edge = get_gradient_edge(y)
        del y
        shares = project is not None and trace.shares_nodes
        dx, do, *dparameters = torch.autograd.grad(
            y_edge, [x, o, *self._gradients.parameters], dy, retain_graph=shares, allow_unused=True
        )
        self._gradients.add(dparameters)
        return torch.zeros_like(x) if dx is None else dx, torch.zeros_like(o) if do is None else do

    def _project(self, key: SliceKey, x: Tensor, positions: Tensor, products: list[Tensor], project: Project) -> None:
        """Run a slice up to its attention call, again, for q and kv and their graph."""
        replayed = {number: products.pop(0) for number in self._saved.trace.saved_before(self._recompute)}
        tape = LinearTape(replayed=replayed, sums=self._gradients)
        del replayed
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self._saved.random_states.replay(random_key(key, "before")):
            project(x, self._layer.attention_call(x, positions, tape))

    def _attend_row(self, row: list[Tile], started: _StartedRow) -> _StartedRow:
        """Run the attention tiles of one query chunk, and start the all-to-all of the gradients of q and kv."""
        stream, exchanges = self._stream, started.exchanges
        if stream.overlaps_rows and row[0].query == 0:
            self._expect_first_loads_below()  # the tiles of the last row hide these copies, and no later stage does
        else:
            self._store.release_sent()  # an earlier row's dx, copied out by now: a row has started since
        tiles = TileRow(stream.attention, started.projections.variant, row)
        to_tokens = stream.shares_to_tokens(QUERIES_KEYS_VALUES, len(exchanges))
        all_sinks = stream.own_sinks(started.projections.sinks, len(exchanges))
        dsinks = [
            self._attend_share(tiles, exchanges.pop(0), lse.contiguous(), sinks, to_tokens)
            for lse, sinks in zip(started.lse.chunk(len(exchanges), 1), all_sinks, strict=True)
        ]
        if started.projections.sinks is not None:
            self._own_dsinks.add(torch.cat(dsinks))
        del started.lse
        exchanges.append(to_tokens)
        return started

    def _attend_share(
        self, row: TileRow, exchange: Exchange, lse: Tensor, sinks: Tensor | None, to_tokens: SharesToTokens
    ) -> Tensor:
        """Run the tiles on a share of the heads, and start the all-to-all of dq and dkv; return dsinks."""
        q, kv, o, do = exchange()
        queries, own = QueryChunk(q, AttentionOutput(o, lse), do), [kv, *self._own_dkv]
        self._own_dkv.clear()
        del kv, exchange  # only `own` references kv now, until the first tile takes it
        with named_range(ATTENTION):
            dq, dkv_row, dkv_before = self._tiles.attend(row, queries, own, self._row_ahead)
        for what, value in zip(PROJECTED, (dq, dkv_row), strict=True):
            self._stream.observer.note("backward", what, self._layer.layer_number, row.tiles[0].query, value)
        self._own_dkv.extend([] if dkv_before is None else [dkv_before])
        dsinks = lse.new_empty(0) if sinks is None else sink_gradients(o, do, lse, sinks)
        del q, o, do, queries
        to_tokens.start((dq, dkv_row))
        return dsinks

    def _finish_row(self, chunk: int, started: _StartedRow) -> Tensor:
        """Return the gradient of the block's input for one query chunk; add the parameters' gradients to their sums."""
        dq, dkv = started.exchanges.pop()()
        dsinks = self._sink_gradients(started) if chunk == 0 else []
        with named_range(TOKEN_WISE):
            self._add_input_gradients(started, dq, dkv, dsinks)
        return self._stream.noted("backward", INPUT, self._layer.layer_number, chunk, started.dx)

    def _sink_gradients(self, started: _StartedRow) -> list[Tensor]:
        """Return the gradient of the sinks, if there are any, summed over all rows of this rank's heads."""
        sinks, own_dsinks = started.projections.sinks, self._own_dsinks.total
        if sinks is None or own_dsinks is None:
            return []
        dsinks = torch.zeros_like(sinks)
        self._stream.own_entries(dsinks).copy_(own_dsinks)
        return [dsinks]

    def _add_input_gradients(self, started: _StartedRow, dq: Tensor, dkv: Tensor, dsinks: list[Tensor]) -> None:
        """Backpropagate through the projections of each slice, and through the sinks of the last."""
        graphs = started.projections.graphs
        for number, (s, x, edges) in enumerate(graphs, 1):
            gradients = [dq[s], dkv[s], *(dsinks if number == len(graphs) else [])]
            dx_before, *dparameters = torch.autograd.grad(
                edges[: len(gradients)], [x, *self._gradients.parameters], gradients, allow_unused=True
            )
            self._gradients.add(dparameters)
            if dx_before is not None and len(dx_before) == len(started.dx):
                started.dx = started.dx + dx_before  # not in place: dx may be the gradient of the block's output itself
            elif dx_before is not None:
                started.dx[s].add_(dx_before)

    def _recomputed_keys_and_values(self) -> dict[int, Tensor]:
        """Recompute kv of all chunks that tiles of any rank load, from the block's inputs. Collective as the block is.

        Saved kv uses as much of the tier as attention outputs, or more where heads are repeated for the ranks.
        Recomputing it costs the products before attention and an all-to-all: little compared with attention.
        """
        kv_CBKD = {}
        chunks = self._saved.plan.loaded_keys()
        inputs_ahead = self._store.prefetch([self._xs[i], self._positions[i]] for i in chunks)
        for i, exchange in zip(chunks, self._stream.one_row_ahead(self._projected(inputs_ahead)), strict=True):
            (kv,) = exchange()
            if self._saved.plan.is_loaded(i):
                kv_CBKD[i] = self._store.add(kv, ChunkKind.KEYS_VALUES)
        return kv_CBKD

    @torch.no_grad()
    def _projected(self, inputs_ahead: Prefetch) -> Iterator[Exchange]:
        for x, positions in inputs_ahead:
            slices = [(x[s], positions[:, s]) for _, s in self._stream.numbered_slices(x)]
            kv = joined([self._layer.attention_call(*each, LinearTape()).kv_cBKD for each in slices])
            yield from self._stream.start_tokens_to_heads([kv], QUERIES_KEYS_VALUES[1:])
