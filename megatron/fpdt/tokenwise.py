"""A token-wise module as a stream: the embedding, chunk by chunk from tokens to the residual stream.

Forward stores each chunk on the tier. Backward recomputes the module on each chunk and sums the parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.core.ranges import TOKEN_WISE, named_range
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.stream import Stream
from megatron.ops.gradient_sum import GradientSums


class StreamableEmbedding(Protocol):
    """The interface of an embedding that can be streamed."""

    hidden_size: int

    @property
    def uses_dropout(self) -> bool:
        """Whether `embed` draws random numbers now."""
        ...

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Embed tokens, token-wise: [S, B, h]."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def stream_embedding(
    stream: Stream, module: StreamableEmbedding, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor
) -> Tensor:
    """Embed this rank's tokens [B, S/p]; the result [S/p, B, h] is stored on the stream's tier.

    `anchor` is a scalar whose gradient, zero, arrives when the backward pass of the embedding is over.
    """
    stream.begin_sequence(stream.layout(tokens_BS.T).sequence_length)
    parameters = [p for p in module.parameters() if p.requires_grad]
    save = torch.is_grad_enabled()
    return _StreamedEmbedding.apply(stream, module, tokens_BS, positions_BS, save, anchor, *parameters)


class _StreamedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Stream,
        module: StreamableEmbedding,
        tokens: Tensor,
        positions: Tensor,
        save: bool,
        anchor: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        store, lengths = stream.store, stream.layout(tokens.T).local_lengths
        states = RandomStates(store.device, enabled=module.uses_dropout and save)
        dtype = next(module.parameters()).dtype
        x = store.empty((tokens.shape[1], tokens.shape[0], module.hidden_size), dtype, ChunkKind.HIDDEN_STATES)
        inputs_ahead = store.prefetch(zip(tokens.split(lengths, 1), positions.split(lengths, 1), strict=True))
        for i, (chunk, inputs) in enumerate(zip(x.split(lengths), inputs_ahead, strict=True)):
            states.record(i)
            with named_range(TOKEN_WISE):
                store.put(chunk, stream.noted("forward", "output of the embedding", None, i, module.embed(*inputs)))
        if save:
            ctx.save_for_backward(tokens, positions)
            ctx.stream, ctx.module, ctx.states, ctx.parameters = stream, module, states, parameters
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.parameters:
            return None, None, None, None, None, torch.zeros(())
        stream, (tokens, positions) = ctx.stream, ctx.saved_tensors
        lengths = stream.layout(tokens.T).local_lengths
        gradients = GradientSums(ctx.parameters)
        dxs = grads[0].contiguous().split(lengths)
        ahead = stream.store.prefetch(zip(tokens.split(lengths, 1), positions.split(lengths, 1), dxs, strict=True))
        for i, (*inputs, dx) in enumerate(ahead):
            with ctx.states.replay(i), torch.enable_grad():
                x = ctx.module.embed(*inputs)
            gradients.add(torch.autograd.grad(x, ctx.parameters, dx, allow_unused=True))
        return None, None, None, None, None, torch.zeros(()), *gradients.result()
