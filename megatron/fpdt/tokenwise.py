"""A token-wise module as a stream: the embedding, chunk by chunk from tokens to the residual stream.

Forward stores each chunk on the tier; backward runs the module again on each chunk and sums the parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.fpdt.random_state import RandomStates
from megatron.fpdt.stream import GradientSum, Stream


class TokenEmbedding(Protocol):
    """What a module must be to be streamed."""

    hidden_size: int

    @property
    def uses_dropout(self) -> bool:
        """Whether `embed` draws random numbers now."""
        ...

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Token-wise: [S, B, h]."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def stream_embedding(
    stream: Stream, module: TokenEmbedding, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor
) -> Tensor:
    """Embed this rank's tokens [B, S/p]; the result [S/p, B, h] rests on the stream's tier.

    `anchor` is a scalar whose gradient, zero, arrives when the backward pass of the embedding is over.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    keep = torch.is_grad_enabled()
    return _StreamedEmbedding.apply(stream, module, tokens_BS, positions_BS, keep, anchor, *parameters)


class _StreamedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Stream,
        module: TokenEmbedding,
        tokens: Tensor,
        positions: Tensor,
        keep: bool,
        anchor: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        store, lengths = stream.store, stream.layout(tokens.T).local_lengths
        states = RandomStates(store.device, enabled=module.uses_dropout and keep)
        dtype = next(module.parameters()).dtype
        x = store.empty((tokens.shape[1], tokens.shape[0], module.hidden_size), dtype)
        for chunk, inputs in zip(x.split(lengths), _chunks(stream, tokens, positions), strict=True):
            states.record()
            store.put(chunk, module.embed(*inputs))
        if keep:
            ctx.save_for_backward(tokens, positions)
            ctx.stream, ctx.module, ctx.states, ctx.parameters = stream, module, states, parameters
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.parameters:
            return None, None, None, None, None, torch.zeros(())
        stream = ctx.stream
        tokens, positions = ctx.saved_tensors
        gradients = GradientSum(ctx.parameters)
        dx_ahead = stream.store.prefetch(
            [dx] for dx in grads[0].contiguous().split(stream.layout(tokens.T).local_lengths)
        )
        for i, inputs in enumerate(_chunks(stream, tokens, positions)):
            with ctx.states.replay(i), torch.enable_grad():
                x = ctx.module.embed(*inputs)
            (dx,) = next(dx_ahead)
            gradients.add(torch.autograd.grad(x, ctx.parameters, dx, allow_unused=True))
        return None, None, None, None, None, torch.zeros(()), *gradients.result()


def _chunks(stream: Stream, *tensors_BS: Tensor) -> Iterator[tuple[Tensor, ...]]:
    lengths = stream.layout(tensors_BS[0].T).local_lengths
    for chunk in zip(*(t.split(lengths, 1) for t in tensors_BS), strict=True):
        yield tuple(stream.on_device(t) for t in chunk)
