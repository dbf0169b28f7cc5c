"""One transformer block as a stream: forward and backward chunk by chunk, nothing of full length on the device.

The output and log-sum-exp of attention are saved, and only token-wise work is recomputed. The outputs of linear layers
may be saved too, on the tier like the rest (megatron.fpdt.layer_trace). Keys and values are saved, or recomputed in one
pass before the first row. With the least memory attention is recomputed as well, for several blocks together
(megatron.fpdt.block_inputs). The schedules are in megatron.fpdt.forward_pass and backward_pass.

    S tokens of the sequence, c and C of one chunk (this rank's and all ranks'), B batch, h hidden size,
    H query heads, K key/value heads, D head size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.documents import Documents
from megatron.fpdt.backward_pass import BackwardPass
from megatron.fpdt.block_chain import BlockChain
from megatron.fpdt.forward_pass import ForwardPass
from megatron.fpdt.plan import chunk_plan
from megatron.fpdt.stream import BACKWARD_RUNS_ONCE, Layer, Stream
from megatron.fpdt.streamed_layer import StreamedLayer


class StreamedBlock:
    """A layer executed as a stream; replaces the layer's `forward`."""

    def __init__(self, stream: Stream, layer: Layer, chain: BlockChain) -> None:
        """Take the `chain` that the model's blocks share."""
        self.layer, self.chain = StreamedLayer(stream, layer), chain

    def __call__(self, x_SBh: Tensor, positions_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """Run the block on x [S/p, B, h]. x and the result hold this rank's tokens and are stored on the stream's tier.

        With `documents`, those of the sequences of all S tokens, a token attends to its own document only.
        Collective over the sequence-parallel group: every rank calls it for the same block. So is its backward pass.
        """
        save, parameters = torch.is_grad_enabled(), self.layer.parameters
        return _StreamedBlock.apply(x_SBh, positions_BS, documents, self, save, *parameters)


class _StreamedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        positions: Tensor,
        documents: Documents | None,
        block: StreamedBlock,
        save: bool,
        *parameters: Tensor,
    ) -> Tensor:
        layer, variant = block.layer, block.layer.layer.variant
        chunk_lengths, rows = layer.stream.layout(x).chunk_lengths, layer.stream.rows
        plan = chunk_plan(chunk_lengths, documents, rows, variant.window, variant.local_block)
        y, saved = ForwardPass(layer, plan, x, positions, save).run()
        if saved is not None:
            ctx.block = block.chain.append(layer, saved, x, y)
            # Save a saved input with autograd too, which detects writes to it.
            ctx.save_for_backward(positions, *[x] * ctx.block.saves_input)
            ctx.layer, ctx.parameters = layer, parameters
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        block, ctx.block = ctx.block, None
        if block is None:
            raise RuntimeError(BACKWARD_RUNS_ONCE)
        _ = ctx.saved_tensors  # raises if one of them was written to
        dx, dparameters = BackwardPass(ctx.layer, block, grads[0].contiguous(), ctx.parameters).run()
        return dx, None, None, None, None, *dparameters
