"""Inputs of consecutive blocks of which only the first is kept: the others are rebuilt when they are needed.

    x[l+1] = layer_l(x[l]), its attention output o[l] being known

The attention outputs o are kept for the backward pass in any case, so that this is token-wise work, without attention.
Keeping x of every k-th block, and rebuilding the k-1 between them when the backward pass reaches the highest, saves
almost half of the host memory for large k, and costs the products after attention once more, of all blocks but every
k-th.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.ranges import TOKEN_WISE, named_range
from megatron.fpdt.layer_trace import LayerTrace
from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.seam import AttentionCall
from megatron.fpdt.store import Prefetch
from megatron.fpdt.stream import Stream
from megatron.fpdt.streamed_layer import SliceKey, StreamedLayer, joined, random_key
from megatron.ops.linear import LinearTape


@dataclass
class Step:
    """How a block's output follows from its input."""

    layer: StreamedLayer
    trace: LayerTrace
    positions_BS: Tensor
    o_cBHD: Sequence[Tensor]
    random_states: RandomStates


class BlockInputs:
    """The inputs of a chain of blocks, by position in it; that of position 0 is kept."""

    def __init__(self, stream: Stream, x_SBh: Tensor) -> None:
        self._stream = stream
        self._inputs = [x_SBh.detach()]
        self._steps: list[Step] = []
        self._output: Callable[[], torch.UntypedStorage | None] = lambda: None

    def __len__(self) -> int:
        """Blocks of the chain that have been run."""
        return len(self._steps)

    def ends_with(self, x_SBh: Tensor) -> bool:
        """Whether x is the output of the last block of the chain."""
        return self._output() is x_SBh.untyped_storage()

    def append(self, step: Step, y_SBh: Tensor) -> None:
        """Add a block that has been run, and its output, which is not kept."""
        self._steps.append(step)
        self._output = weakref.ref(y_SBh.untyped_storage())

    def take(self, position: int) -> Tensor:
        """The input of the block at `position`, whose backward pass begins; no block above it will be asked for.

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
        y = stream.store.empty(x.shape, x.dtype)
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
    """The layer's output for one slice, without the products that only attention needs."""
    states = step.random_states

    def attend(call: AttentionCall) -> Tensor:
        states.continue_with(random_key(key, "after"))
        return o

    with states.replay(random_key(key, "before")), named_range(TOKEN_WISE):
        return step.layer.run(x, positions, LinearTape(skipped=step.trace.before_attention_alone), attend)
