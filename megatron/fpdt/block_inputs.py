"""Inputs of consecutive blocks: only the first is saved for backward, the others are rebuilt when they are needed.

    x[l+1] = layer_l(x[l]), with its saved attention output o[l]

Where the attention outputs o are saved for backward, rebuilding is token-wise work, without attention. With x saved for
every k-th block only, the k-1 inputs between are rebuilt when the backward pass reaches the highest of these blocks.
For large k this saves almost half of the host memory. The cost is one more run of the products after attention, for all
blocks but every k-th.

Where they are not, the k blocks are recomputed, with attention, when the backward pass reaches the highest of them.
Their k attention outputs are saved then, and the inputs of the upper half of the blocks. When the backward pass of the
upper half is over, the inputs of the lower half are rebuilt from the attention outputs and take their place. In memory
at the start of a block's backward pass, for k = 5:

    block    5            4          3        2      1
    o of     1 2 3 4 5    1 2 3 4    1 2 3    1 2    1
    x of     1 4 5        1 4        1 2 3    1 2    1
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.ranges import TOKEN_WISE, named_range
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.forward_pass import RecomputedForwardPass
from megatron.fpdt.saved import Saved
from megatron.fpdt.seam import AttentionCall
from megatron.fpdt.store import Prefetch
from megatron.fpdt.stream import Stream
from megatron.fpdt.streamed_layer import SliceKey, StreamedLayer, joined, random_key
from megatron.ops.linear import LinearTape


@dataclass
class Step:
    """A block that has run, and what it has saved: with the attention output, its output can be rebuilt."""

    layer: StreamedLayer
    saved: Saved


class BlockInputs:
    """The inputs of a chain of blocks, by position in the chain; the input at position 0 is saved."""

    def __init__(self, stream: Stream, x_SBh: Tensor) -> None:
        self._stream = stream
        self._inputs = {0: x_SBh.detach()}
        self._steps: list[Step] = []
        self._output: Callable[[], torch.UntypedStorage | None] = lambda: None

    def __len__(self) -> int:
        """Return the number of blocks of the chain that have run."""
        return len(self._steps)

    def ends_with(self, x_SBh: Tensor) -> bool:
        """Whether x is the output of the last block of the chain."""
        return self._output() is x_SBh.untyped_storage()

    def append(self, step: Step, y_SBh: Tensor) -> None:
        """Add a block that has run. Its output is not saved, only recognized by `ends_with`."""
        self._steps.append(step)
        self._output = weakref.ref(y_SBh.untyped_storage())

    def first_loads(self, position: int, dy: Sequence[Tensor]) -> list[Tensor]:
        """Return the chunks that the backward pass of the block at `position` begins with, `dy` of its gradient."""
        if position >= len(self._steps):  # a block below has begun before it
            return []
        saved = self._steps[position].saved
        if not saved.has_attention:
            return [self._chunks(0)[0]]
        recomputed_kv = saved.plan.loaded_keys() if saved.kv_CBKD is None else ()
        first_x = [self._chunks(position)[next(iter(recomputed_kv), -1)]] if position in self._inputs else []
        return [*first_x, saved.o_cBHD[-1], saved.lse_BHC[-1], *dy]

    def loads(self, position: int) -> list[Tensor]:
        """Return the chunks that the backward pass of the block at `position` loads, as far as they are there."""
        if position >= len(self._steps):  # a block below has begun before it
            return []
        saved = self._steps[position].saved
        if not saved.has_attention:
            return [*self._chunks(0)]
        return [*saved.loads(self._chunks(position) if position in self._inputs else ())]

    def take(self, position: int, dy: Sequence[Tensor]) -> tuple[Tensor, Saved]:
        """Return the input of the block at `position`, whose backward pass begins, and what the block has saved.

        Drop both, and all above. `dy` are chunks that the backward pass begins with. Collective over the
        sequence-parallel ranks where attention is recomputed, and over the data-parallel ranks where parameters are
        partitioned.
        """
        del self._steps[position + 1 :]
        if not self._steps[position].saved.has_attention:
            self._recompute_attention(dy)
        if position not in self._inputs:
            self._rebuild_inputs(position)
        x = self._inputs.pop(position)
        return x, self._steps.pop().saved

    def _chunks(self, position: int) -> Sequence[Tensor]:
        """Return the chunks of an input that is there."""
        x = self._inputs[position]
        return x.split(self._stream.layout(x).local_lengths)

    @torch.no_grad()
    def _recompute_attention(self, dy: Sequence[Tensor]) -> None:
        """Recompute the chain; save the attention outputs of all blocks, and the inputs of the upper half."""
        *others, highest = self._steps
        num_rebuilt, x = len(others) // 2, self._inputs[0]
        for position, step in enumerate(others, 1):
            with self._stream.whole_parameters(step.layer.layer.parameters()):
                x, step.saved = RecomputedForwardPass(step.layer, step.saved, x).run()
            if position > num_rebuilt:
                self._inputs[position] = x
        next_loads = [self._chunks(len(others))[-1], *dy]
        highest.saved = RecomputedForwardPass(highest.layer, highest.saved, x).run_without_output(next_loads)

    def _rebuild_inputs(self, position: int) -> None:
        """Rebuild an input, and all below it."""
        for below in range(position):
            self._inputs[below + 1] = self._rebuild(self._inputs[below], self._steps[below])

    @torch.no_grad()
    def _rebuild(self, x: Tensor, step: Step) -> Tensor:
        stream, lengths = self._stream, self._stream.layout(x).local_lengths
        y = stream.store.empty(x.shape, x.dtype, ChunkKind.HIDDEN_STATES)
        chunks = zip(x.split(lengths), step.saved.positions_BS.split(lengths, 1), step.saved.o_cBHD, strict=True)
        ahead = stream.store.prefetch(chunks)
        with stream.whole_parameters(step.layer.layer.parameters()):
            for i, y_i in enumerate(y.split(lengths)):
                stream.store.put(y_i, self._next_output(step, i, ahead))
        return y

    def _next_output(self, step: Step, chunk: int, ahead: Prefetch) -> Tensor:
        x, positions, o = next(ahead)
        slices = self._stream.numbered_slices(x)
        return joined([_output(step, (chunk, number), x[s], positions[:, s], o[s]) for number, s in slices])


def _output(step: Step, key: SliceKey, x: Tensor, positions: Tensor, o: Tensor) -> Tensor:
    """Recompute the layer's output for one slice, without the products that only attention needs."""
    states = step.saved.random_states

    def attend(call: AttentionCall) -> Tensor:
        states.continue_with(random_key(key, "after"))
        return o

    with states.replay(random_key(key, "before")), named_range(TOKEN_WISE):
        return step.layer.run(x, positions, LinearTape(skipped=step.saved.trace.before_attention_alone), attend)
