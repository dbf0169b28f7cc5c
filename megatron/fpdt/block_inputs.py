"""Inputs of consecutive blocks of which only the first is kept: the others are rebuilt when they are needed.

    x[l+1] = sum of after_l(x[l], o[l])

The attention outputs o are kept for the backward pass in any case, so that this is token-wise work, without attention.
Keeping x of every k-th block, and rebuilding the k-1 between them when the backward pass reaches the highest, saves
almost half of the host memory for large k, and costs one more `after` of all blocks but every k-th.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.store import Prefetch
from megatron.fpdt.stream import Stream, StreamedModule


@dataclass
class _Step:
    """How a block's output follows from its input."""

    block: StreamedModule
    o_cBHD: Sequence[Tensor]
    random_states: RandomStates


class BlockInputs:
    """The inputs of a chain of blocks, by position in it; that of position 0 is kept."""

    def __init__(self, stream: Stream, x_SBh: Tensor) -> None:
        self._stream = stream
        self._inputs = [x_SBh.detach()]
        self._steps: list[_Step] = []
        self._output: Callable[[], torch.UntypedStorage | None] = lambda: None

    def __len__(self) -> int:
        """Blocks of the chain that have been run."""
        return len(self._steps)

    def ends_with(self, x_SBh: Tensor) -> bool:
        """Whether x is the output of the last block of the chain."""
        return self._output() is x_SBh.untyped_storage()

    def append(
        self, block: StreamedModule, o_cBHD: Sequence[Tensor], random_states: RandomStates, y_SBh: Tensor
    ) -> None:
        """Add a block that has been run: the chunks of its attention output, and its output, which is not kept."""
        self._steps.append(_Step(block, o_cBHD, random_states))
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
    def _rebuild(self, x: Tensor, step: _Step) -> Tensor:
        stream, layout = self._stream, self._stream.layout(x)
        y = stream.store.empty(x.shape, x.dtype)
        xs, ys = (t.split(layout.local_lengths) for t in (x, y))
        ahead = stream.store.prefetch(zip(xs, step.o_cBHD, strict=True))
        with stream.whole_parameters(step.block.parameters()):
            for i, y_i in enumerate(ys):
                with step.random_states.replay(i):
                    stream.store.put(y_i, self._next_output(step, ahead))
        return y

    def _next_output(self, step: _Step, ahead: Prefetch) -> Tensor:
        x, o = next(ahead)
        return self._stream.output(step.block, x, o)
