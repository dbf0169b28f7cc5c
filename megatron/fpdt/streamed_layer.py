"""A layer that a stream executes: its runs on a slice of tokens, and the trace of what its backward pass needs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from megatron.core.ranges import TOKEN_WISE, named_range
from megatron.fpdt.layer_trace import LayerTrace, trace_layer
from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.seam import Attend, AttentionCall, SuspendedLayer, run_with_output
from megatron.fpdt.stream import Layer, Stream
from megatron.ops.linear import LinearTape

# A slice of a chunk: (chunk, number of the slice in it).
SliceKey = tuple[int, int]
Part = Literal["before", "after"]


def random_key(key: SliceKey, part: Part) -> tuple[SliceKey, Part]:
    """Return the key of a slice's random state: at the start of the layer, or after its attention call."""
    return key, part


class StreamedLayer:
    """A layer and its own `forward`, which the stream replaces."""

    def __init__(self, stream: Stream, layer: Layer) -> None:
        self.stream, self.layer = stream, layer
        self.layer_number = layer.layer_number
        self.forward = layer.forward
        self._traces: dict[tuple[bool, ...], LayerTrace] = {}

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are trained."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def start(self, x_cBh: Tensor, positions_Bc: Tensor, recorded: Collection[int] = ()) -> StartedSlice:
        """Run a slice of this rank's tokens up to the attention call; record the outputs of `recorded` products."""
        with named_range(TOKEN_WISE):
            return StartedSlice(self, x_cBh, positions_Bc, LinearTape(recorded=recorded))

    def run(self, x_cBh: Tensor, positions_Bc: Tensor, tape: LinearTape, attend: Attend) -> Tensor:
        """Run a slice in one piece, with the attention output that `attend` returns."""
        return run_with_output(self.forward, tape, attend, x_cBh, positions_Bc)

    def attention_call(self, x_cBh: Tensor, positions_Bc: Tensor, tape: LinearTape) -> AttentionCall:
        """Run a slice up to the attention call and no further; return the call."""
        with named_range(TOKEN_WISE):
            started = StartedSlice(self, x_cBh, positions_Bc, tape)
            started.close()
        return started.call

    def repeated_heads(self, kv_cBKD: Tensor) -> Tensor:
        """Repeat the heads of keys and values for the ranks that read them."""
        return self.stream.heads.repeated_keys_and_values(kv_cBKD)

    def trace(self, x_cBh: Tensor, positions_Bc: Tensor) -> LayerTrace:
        """Trace what the backward pass needs by a run of this slice, once for each choice of trained parameters."""
        key = tuple(p.requires_grad for p in self.layer.parameters())
        if key not in self._traces:
            states = RandomStates(self.stream.store.device, enabled=self.layer.uses_dropout)
            with states.preserved():
                self._traces[key] = trace_layer(self.forward, x_cBh, positions_Bc)
        return self._traces[key]


class StartedSlice:
    """A slice of tokens whose layer is suspended until its attention output is there."""

    def __init__(self, streamed: StreamedLayer, x_cBh: Tensor, positions_Bc: Tensor, tape: LinearTape) -> None:
        self._tape = tape
        self._run = SuspendedLayer(streamed.forward, tape, x_cBh, positions_Bc)
        call, planned = self._run.call, streamed.layer.variant
        if call.variant != planned:
            self.close()
            raise RuntimeError(
                f"layer {streamed.layer_number} has called its attention with {call.variant}, "
                f"but its tiles are planned for its own variant, {planned}; use the same for both"
            )
        self.call = call._replace(kv_cBKD=streamed.repeated_heads(call.kv_cBKD))

    def finish(self, o_cBHD: Tensor) -> Tensor:
        """Resume the layer with its attention output; return its own output."""
        with named_range(TOKEN_WISE):
            return self._run.finish(o_cBHD)

    def take_outputs(self) -> list[Tensor]:
        """Return the outputs of the recorded products since the last call."""
        return self._tape.take_outputs()

    def close(self) -> None:
        """Abort the run if it has not finished."""
        self._run.close()


def joined(parts: list[Tensor], dimension: int = 0) -> Tensor:
    """Concatenate slices to one chunk, or parts along another dimension."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dimension)
