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

    saved: Saved
    inputs: BlockInputs
    position: int
    input_is_on_device: bool
    first_loads: Sequence[Tensor]
    """The chunks that the backward pass begins with."""

    below: Callable[[], ChainedBlock | None]
    """The block below, if its backward pass is still to come."""

    @property
    def saves_input(self) -> bool:
        """Whether the block's input is saved, not rebuilt."""
        return self.position == 0

    def take_input(self) -> Tensor:
        """Return the block's input, whose backward pass begins. Collective as `BlockInputs.take` is."""
        return self.inputs.take(self.position)


class BlockChain:
    """Links each block to those that ran before it. One per model; it keeps none of them alive."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._inputs: Callable[[], BlockInputs | None] = lambda: None
        self._last: Callable[[], ChainedBlock | None] = lambda: None

    def append(self, layer: StreamedLayer, saved: Saved, x_SBh: Tensor, y_SBh: Tensor) -> ChainedBlock:
        """Add a block that has run on x and returned y."""
        stream, inputs = self._stream, self._inputs()
        if inputs is None or len(inputs) == stream.checkpoint_interval or not inputs.ends_with(x_SBh):
            inputs = BlockInputs(stream, x_SBh)
            self._inputs = weakref.ref(inputs)
        position = len(inputs)
        inputs.append(Step(layer, saved.trace, saved.positions_BS, saved.o_cBHD, saved.random_states), y_SBh)
        recomputed_kv = () if stream.recompute.saves_keys_and_values else saved.plan.loaded_keys()
        first_chunk = next(iter(recomputed_kv), -1)
        first_x = x_SBh.split(stream.layout(x_SBh).local_lengths)[first_chunk]
        block = ChainedBlock(
            saved=saved,
            inputs=inputs,
            position=position,
            input_is_on_device=stream.store.is_on_device(x_SBh),
            first_loads=[*[first_x] * (position == 0), saved.o_cBHD[-1], saved.lse_BHC[-1]],
            below=self._last,
        )
        self._last = weakref.ref(block)
        return block
