"""Chain of the blocks that one sequence passes: whose inputs are rebuilt together, and which block is below which."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron.fpdt.block_inputs import BlockInputs, Step
from megatron.fpdt.saved import Saved
from megatron.fpdt.stream import Stream
from megatron.fpdt.streamed_layer import StreamedLayer


@dataclass(frozen=True)
class ChainedBlock:
    """A block that has run, until its backward pass. Its input is the one at `position` of `inputs`."""

    inputs: BlockInputs
    position: int
    input_is_on_device: bool

    below: Callable[[], ChainedBlock | None]
    """The block below, if its backward pass is still to come."""

    @property
    def saves_input(self) -> bool:
        """Whether the block's input is saved, not rebuilt."""
        return self.position == 0

    def first_loads(self, dy: Sequence[Tensor]) -> list[Tensor]:
        """Return the chunks that the backward pass begins with, `dy` of the gradient of the block's output."""
        return self.inputs.first_loads(self.position, dy)

    def loads(self) -> list[Tensor]:
        """Return the chunks that the backward pass loads, in order, as far as they are there."""
        return self.inputs.loads(self.position)

    def take(self, dy: Sequence[Tensor]) -> tuple[Tensor, Saved]:
        """Return the block's input, whose backward pass begins, and what it has saved, as `BlockInputs.take` does."""
        return self.inputs.take(self.position, dy)


class BlockChain:
    """Links each block to those that ran before it. One per model; it keeps none of them alive."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._inputs: Callable[[], BlockInputs | None] = lambda: None
        self._last: Callable[[], ChainedBlock | None] = lambda: None

    def append(self, layer: StreamedLayer, saved: Saved, x_SBh: Tensor, y_SBh: Tensor) -> ChainedBlock:
        """Add a block that has run on x and returned y."""
        stream, inputs = self._stream, self._inputs()
        if inputs is None or len(inputs) == stream.saving(x_SBh).checkpoint_interval or not inputs.ends_with(x_SBh):
            inputs = BlockInputs(stream, x_SBh)
            self._inputs = weakref.ref(inputs)
        position = len(inputs)
        inputs.append(Step(layer, saved), y_SBh)
        block = ChainedBlock(inputs, position, stream.store.is_on_device(x_SBh), self._last)
        self._last = weakref.ref(block)
        return block
