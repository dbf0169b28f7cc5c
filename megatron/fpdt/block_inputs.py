"""Inputs of consecutive blocks: only the first is saved for backward, the others are rebuilt when they are needed.

    x[l+1] = layer_l(x[l]), with its saved attention output o[l]

The attention outputs o are saved for backward in any case, so rebuilding is token-wise work, without attention. With x
saved for every k-th block only, the k-1 inputs between are rebuilt when the backward pass reaches the highest of these
blocks. For large k this saves almost half of the host memory. The cost is one more run of the products after attention,
for all blocks but every k-th.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.ranges import TOKEN_WISE, named_range
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.layer_trace import LayerTrace
from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.seam import AttentionCall
from megatron.fpdt.store import Prefetch
from megatron.fpdt.stream import Stream
from megatron.fpdt.streamed_layer import SliceKey, StreamedLayer, joined, random_key
from megatron.ops.linear import LinearTape


@dataclass
class Step:
    """What it takes to recompute a block's output from its input."""

    layer: StreamedLayer
    trace: LayerTrace
    positions_BS: Tensor
    o_cBHD: Sequence[Tensor]
    random_states: RandomStates


class BlockInputs:
    """The inputs of a chain of blocks, by position in the chain; the input at position 0 is saved."""

    def __init__(self, stream: Stream, x_SBh: Tensor) -> None:
        self._stream = stream
        self._inputs = [x_SBh.detach()]
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

    def take(self, position: int) -> Tensor:
        """Return the input of the block at `position`, whose backward pass begins. Drop it and all above it.

        Collective over the sequence-parallel and data-parallel ranks where parameters are partitioned.
        """
        del self._steps[position:]
        while len(self._inputs) <= position:
            step = self._steps[len(self._inputs) - 1]
            self._inputs.append(self._rebuild(self._inputs[-1], step))
        x = self._inputs[position]
        del self._inputs[position:]
        return x

    @torch.no_grad()
    def _rebuild(self, x: Tensor, step: Step) -> Tensor:
        stream, lengths = self._stream, self._stream.layout(x).local_lengths
        y = stream.store.empty(x.shape, x.dtype, ChunkKind.HIDDEN_STATES)
        chunks = zip(x.split(lengths), step.positions_BS.split(lengths, 1), step.o_cBHD, strict=True)
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
    states = step.random_states

    def attend(call: AttentionCall) -> Tensor:
        states.continue_with(random_key(key, "after"))
        return o

    with states.replay(random_key(key, "before")), named_range(TOKEN_WISE):
        return step.layer.run(x, positions, LinearTape(skipped=step.trace.before_attention_alone), attend)
