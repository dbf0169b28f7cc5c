"""Forward pass of a streamed block. For query chunk i ascending:

    copy-in            compute                                        communication         copy-out
    x[i+1]             layer(x[i]) up to its attention call: q, kv    tokens -> heads       kv[i]
    kv[0], kv[1], ..   (o, lse) merged over tiles (i, j), j <= i      heads -> tokens
                       the rest of layer(x[i]): y[i]                                        o[i], lse[i], y[i]

A row has three stages: start, attend, finish. The first two end with an all-to-all. With several ranks, each is hidden
behind a stage of another row; the compute queue for four chunks is

    start 0, start 1, attend 0, start 2, attend 1, finish 0, start 3, attend 2, finish 1, attend 3, finish 2, finish 3

With one rank a row's stages follow each other. With several ranks and one chunk its heads are exchanged in two shares:
attention of the first runs while the second is on its way to heads, and that of the second while the output of the
first is on its way to tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.core.collectives import QUERIES_KEYS_VALUES, Exchange, SharesToTokens
from megatron.core.ranges import ATTENTION, named_range
from megatron.fpdt.attention_tiles import TileRow, attend
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.layer_trace import LayerTrace
from megatron.fpdt.observer import ATTENTION_OUTPUT, OUTPUT, PROJECTED
from megatron.fpdt.plan import ChunkPlan, Tile
from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.saved import Products, Saved
from megatron.fpdt.streamed_layer import StartedSlice, StreamedLayer, joined, random_key


@dataclass
class _SuspendedRow:
    """A query chunk whose layer is suspended at attention, and its all-to-alls in progress.

    They are those of the shares of its heads, then the one back to tokens.
    """

    slices: list[StartedSlice]
    exchanges: list[Exchange]
    lse: list[Tensor] = field(default_factory=list)  # of the shares whose tiles have run


class ForwardPass:
    """The forward pass of one block on one sequence."""

    phase = "forward"

    def __init__(self, layer: StreamedLayer, plan: ChunkPlan, x_SBh: Tensor, positions_BS: Tensor, save: bool) -> None:
        """Prepare the prefetches. With `save`, `run` also returns what is saved for backward."""
        self._layer, self._stream, self._store = layer, layer.stream, layer.stream.store
        self._plan, self._x, self._positions = plan, x_SBh, positions_BS
        self._layout = self._stream.layout(x_SBh)
        self._random_states = RandomStates(self._store.device, enabled=layer.layer.uses_dropout and save)
        self._products_before: Products = defaultdict(list)
        self._products_after: Products = defaultdict(list)
        self._started: list[StartedSlice] = []
        self._recompute = self._stream.saving(x_SBh).recompute
        self._save, self._saves_attention = save, save and self._recompute.saves_attention
        self._trace: LayerTrace | None = None  # known from the first slice on, if the pass saves
        # Chunks on the tier.
        self._kv: dict[int, Tensor] = {}
        self._o: list[Tensor] = []
        self._lse: list[Tensor] = []
        xs = x_SBh.split(self._layout.local_lengths)
        chunk_positions = positions_BS.split(self._layout.local_lengths, 1)
        rows = plan.forward_rows()
        self._store.read_ahead(xs)
        self._x_ahead = self._store.prefetch([xs[row[0].query], chunk_positions[row[0].query]] for row in rows)
        # The generators reference no `self`: a cycle would hold chunks until garbage is collected.
        kv, tiles = self._kv, (tile for row in rows for tile in row if not tile.is_diagonal)
        self._kv_ahead = self._store.prefetch(([kv[tile.key]] for tile in tiles), ahead=False)

    def run(self) -> tuple[Tensor, Saved | None]:
        """Return the block's output, on the tier, and what is saved for backward."""
        y = self._store.empty(self._x.shape, self._x.dtype, ChunkKind.HIDDEN_STATES)
        ys = y.split(self._layout.local_lengths)
        self._store.keep_ahead(ys)  # the block above loads them

        def finish(chunk: int, row: _SuspendedRow) -> None:
            self._store.put(ys[chunk], self._finish_row(chunk, row))

        self._run_rows(finish, ys[:-1][:1])  # the block above begins with this chunk
        kv_CBKD = self._kv if self._recompute.saves_keys_and_values else None
        return y, self._saved(kv_CBKD) if self._save else None

    def _run_rows(self, finish: Callable[[int, _SuspendedRow], None], next_loads: Sequence[Tensor]) -> None:
        """Run all rows; `finish` is the last stage of each. Prefetch `next_loads` during the last row."""
        rows = self._plan.forward_rows()
        started = self._stream.one_row_ahead(self._start_row(row[0].query) for row in rows)
        attended = self._stream.one_row_ahead(self._attend_row(row, next(started)) for row in rows)
        try:
            for row in rows:
                i = row[0].query
                with self._stream.chunk(self.phase, self._layer.layer_number, i):
                    if row is rows[-1]:
                        self._store.expect(next_loads)
                    finish(i, next(attended))
        finally:
            for each in self._started:
                each.close()

    # One function per stage of a row: its locals die on return, so a chunk's buffers are free before the next prefetch.
    # The device holds the chunk in use and the prefetched one.

    def _start_row(self, chunk: int) -> _SuspendedRow:
        x, positions = next(self._x_ahead)
        slices = [self._start_slice(chunk, number, x, positions, s) for number, s in self._stream.numbered_slices(x)]
        projected = [joined([each.call.q_cBHD for each in slices]), joined([each.call.kv_cBKD for each in slices])]
        for what, value in zip(PROJECTED, projected, strict=True):
            self._stream.observer.note(self.phase, what, self._layer.layer_number, chunk, value)
        num_shares = self._stream.num_head_shares(len(self._plan.forward_rows()), len(projected[0]))
        return _SuspendedRow(slices, self._stream.start_tokens_to_heads(projected, QUERIES_KEYS_VALUES, num_shares))

    def _start_slice(self, chunk: int, number: int, x: Tensor, positions: Tensor, s: slice) -> StartedSlice:
        x, positions = x[s], positions[:, s]
        recorded: Sequence[int] = ()
        if self._save:
            trace = self._trace = self._trace or self._layer.trace(x, positions)
            recorded = trace.saved_before(self._recompute) + trace.saved_after(self._recompute)
        self._begin_random(random_key((chunk, number), "before"))
        started = self._layer.start(x, positions, recorded)
        self._started.append(started)
        self._products_before[chunk].append(self._saved_products(started.take_outputs()))
        return started

    def _attend_row(self, row: list[Tile], suspended: _SuspendedRow) -> _SuspendedRow:
        """Run the attention tiles of one query chunk, and start the all-to-all of their output."""
        call, exchanges = suspended.slices[0].call, suspended.exchanges
        tiles = TileRow(self._stream.attention, call.variant, row)
        to_tokens = self._stream.shares_to_tokens(num_shares=len(exchanges))
        for sinks in self._stream.own_sinks(call.sinks_H, len(exchanges)):
            suspended.lse.append(self._attend_share(tiles, exchanges.pop(0), sinks, to_tokens))
        exchanges.append(to_tokens)
        return suspended

    def _attend_share(
        self, row: TileRow, exchange: Exchange, sinks: Tensor | None, to_tokens: SharesToTokens
    ) -> Tensor:
        """Run the tiles on a share of the heads, and start the all-to-all of the output; return lse."""
        store, i = self._store, row.tiles[0].query
        q, kv = exchange()
        if self._plan.is_loaded(i):
            self._kv[i] = store.add(kv, ChunkKind.KEYS_VALUES)
        with named_range(ATTENTION):
            o_heads, lse = attend(row, q, kv, self._kv_ahead, sinks)
        del q, kv, exchange
        self._stream.observer.note(self.phase, ATTENTION_OUTPUT, self._layer.layer_number, i, o_heads)
        store.release_sent()  # the previous row's chunks, copied out by now
        to_tokens.start([o_heads])
        return lse

    def _finish_row(self, chunk: int, suspended: _SuspendedRow) -> Tensor:
        """Return the block's output for one query chunk."""
        y = self._finish_slices(chunk, suspended.slices, self._attention_output(suspended))
        return self._stream.noted(self.phase, OUTPUT, self._layer.layer_number, chunk, y)

    def _attention_output(self, suspended: _SuspendedRow) -> Tensor:
        """Return the attention output for this rank's tokens of a row; save it."""
        (o,) = suspended.exchanges.pop()()
        if self._saves_attention:
            self._o.append(self._store.add(o, ChunkKind.ATTENTION_OUTPUTS))
            self._lse.append(self._store.add(joined(suspended.lse, 1), ChunkKind.ATTENTION_OUTPUTS))
        return o

    def _finish_slices(self, chunk: int, slices: list[StartedSlice], o: Tensor) -> Tensor:
        outputs = o.split(self._stream.slice_length)
        if len(slices) == 1:
            return self._finish_slice(chunk, 0, slices[0], o)
        y = torch.empty((len(o), *self._x.shape[1:]), dtype=self._x.dtype, device=o.device)
        for number, (each, o_slice) in enumerate(zip(slices, outputs, strict=True)):
            y[number * self._stream.slice_length :][: len(o_slice)] = self._finish_slice(chunk, number, each, o_slice)
        return y

    def _finish_slice(self, chunk: int, number: int, started: StartedSlice, o: Tensor) -> Tensor:
        self._begin_random(random_key((chunk, number), "after"))
        y = started.finish(o)
        self._started.remove(started)
        save = self._saved_products if number else self._first_products
        self._products_after[chunk].append(save(started.take_outputs()))
        return y

    def _saved_products(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [self._store.save(output, ChunkKind.PRODUCTS) for output in outputs]

    def _first_products(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Save the products after attention of a chunk's first slice, if they stay on the device."""
        return self._store.save_on_device(outputs, ChunkKind.FIRST_PRODUCTS)

    def _begin_random(self, key: Hashable) -> None:
        """Begin the work of a key, which may draw random numbers."""
        self._random_states.record(key)

    def _saved(self, kv_CBKD: dict[int, Tensor] | None) -> Saved:
        assert self._trace is not None, "rows have run, and were to be saved"
        return Saved(
            plan=self._plan,
            trace=self._trace,
            positions_BS=self._positions,
            random_states=self._random_states,
            products_before=self._products_before,
            products_after=self._products_after,
            o_cBHD=self._o,
            lse_BHC=self._lse,
            kv_CBKD=kv_CBKD,
        )


class RecomputedForwardPass(ForwardPass):
    """The forward pass of a block again, for the attention output that the first one did not save. The same bits."""

    phase = "recompute"

    def __init__(self, layer: StreamedLayer, saved: Saved, x_SBh: Tensor) -> None:
        """Prepare the prefetches, with what the first pass saved."""
        super().__init__(layer, saved.plan, x_SBh, saved.positions_BS, save=True)
        self._saves_attention, self._random_states = True, saved.random_states

    def run(self) -> tuple[Tensor, Saved]:
        with self._random_states.preserved():
            y, saved = super().run()
        assert saved is not None, "the pass saves"
        return y, saved

    def run_without_output(self, next_loads: Sequence[Tensor]) -> Saved:
        """Run all up to the attention output; save keys and values too. Prefetch `next_loads` during the last row."""
        with self._random_states.preserved():
            self._run_rows(self._finish_attention, next_loads)
        return self._saved(self._kv)

    def _finish_attention(self, chunk: int, suspended: _SuspendedRow) -> None:
        self._attention_output(suspended)
        for each in suspended.slices:
            each.close()
            self._started.remove(each)
            self._products_after[chunk].append([])

    def _begin_random(self, key: Hashable) -> None:
        self._random_states.continue_with(key)
