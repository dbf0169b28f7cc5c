"""Head and cross-entropy as a stream: logits exist for one tile of tokens at a time.

    loss = sum over tokens of mask * (logsumexp(z) - z[label]),   z = logits(x)
    dz   = mask * (softmax(z) - onehot(label)),   dx, dW = vjp of logits at dz

The forward pass computes the gradients of the sum, while the logits are there; the backward pass scales them by the
incoming gradient. They are gradients of an unscaled sum of token losses, so they do not underflow in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from megatron.core.ranges import LOSS, named_range
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.stream import BACKWARD_RUNS_ONCE, Stream
from megatron.fpdt.streamed_layer import joined
from megatron.ops.cross_entropy import cross_entropy_with_gradient, token_losses
from megatron.ops.gradient_sum import GradientSums, accumulation_dtype
from megatron.ops.linear import LinearTape

# With fewer, a matrix product takes less time than adding it to the fp32 sum of the weight's gradient.
TILE_LOGITS = 2**27


class StreamableHead(Protocol):
    """The interface of a module whose loss can be streamed."""

    num_classes: int
    """Logits V of a token."""

    def logits(self, x_Nh: Tensor) -> Tensor:
        """Compute the logits [N, V] of any tokens."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def stream_loss(stream: Stream, head: StreamableHead, x_SBh: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Compute the sum of this rank's masked token losses, a scalar in fp32 (fp64 for fp64) on the compute device.

    x [S/p, B, h] is stored on the stream's tier; labels int64 and mask [B, S/p]. Without gradients the stream's
    observer sees the masked token losses, tile by tile: the tokens in order, [S/p, B] in all.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    return _StreamedLoss.apply(stream, head, x_SBh, labels_BS, mask_BS, torch.is_grad_enabled(), *parameters)


class _StreamedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Stream,
        head: StreamableHead,
        x: Tensor,
        labels: Tensor,
        mask: Tensor,
        save: bool,
        *parameters: Tensor,
    ) -> Tensor:
        store, lengths = stream.store, stream.layout(x).local_lengths
        store.release_sent()  # or the last block's copied-out chunks would be held until its backward pass
        dtype = accumulation_dtype(x.dtype)
        loss = torch.zeros((), dtype=dtype, device=store.device)
        gradients = GradientSums(parameters)
        dx = store.empty(x.shape, x.dtype, ChunkKind.HIDDEN_GRADIENTS, store.is_on_device(x)) if save else None
        dxs = dx.split(lengths) if dx is not None else None
        ahead = store.prefetch(zip(x.split(lengths), labels.split(lengths, 1), mask.split(lengths, 1), strict=True))
        for i, (x_i, labels_i, mask_i) in enumerate(ahead):
            labels_i, mask_i = labels_i.T, mask_i.T.to(dtype)
            tiles = _tiles(x_i, labels_i, mask_i, head.num_classes)
            with named_range(LOSS):
                results = [_tile_loss(head, *tile, gradients if save else None) for tile in tiles]
            chunk_loss = torch.stack([losses.sum() for losses, _ in results]).sum()
            loss += stream.noted("forward", "loss", None, i, chunk_loss)
            if not save:
                for losses, _ in results:
                    stream.observer.note_token_losses(losses)
            if dxs is not None:
                dx_i = joined([tile_dx for _, tile_dx in results if tile_dx is not None])
                store.put(dxs[i], stream.noted("backward", "output of the last layer", None, i, dx_i))
                del dx_i
        if save:
            ctx.save_for_backward(dx)
            ctx.stream, ctx.gradients = stream, gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(BACKWARD_RUNS_ONCE)
        (scale,) = grads
        (dx,) = ctx.saved_tensors
        store, lengths = ctx.stream.store, ctx.stream.layout(dx).local_lengths
        scaled_dx = store.empty(dx.shape, dx.dtype, ChunkKind.HIDDEN_GRADIENTS, store.is_on_device(dx))
        ahead = store.prefetch([chunk] for chunk in dx.split(lengths))
        for target, (chunk,) in zip(scaled_dx.split(lengths), ahead, strict=True):
            # A scalar would be rounded to the dtype of dx first; as a vector it makes the product one in fp32.
            store.put(target, torch.mul(chunk, scale.view(1), out=torch.empty_like(chunk)))
        return None, None, scaled_dx, None, None, None, *gradients.result(scale)


def _tiles(x: Tensor, labels: Tensor, mask: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    length = max(1, TILE_LOGITS // (num_classes * x.shape[1]))
    return zip(x.split(length), labels.split(length), mask.split(length), strict=True)


def _tile_loss(
    head: StreamableHead, x: Tensor, labels: Tensor, mask: Tensor, gradients: GradientSums | None
) -> tuple[Tensor, Tensor | None]:
    """Return one tile's masked token losses [T * B]. With `gradients`, add the parameters' and return (sum, dx)."""
    flat, labels, mask = x.detach().flatten(0, 1), labels.flatten(), mask.flatten()
    if gradients is None:
        return token_losses(head.logits(flat), labels, mask), None
    with torch.enable_grad(), LinearTape(sums=gradients).running():
        logits = head.logits(flat.requires_grad_())
    edge, logits = get_gradient_edge(logits), logits.detach()
    loss, dlogits = cross_entropy_with_gradient(logits, labels, mask)
    del logits
    dx, *dparameters = torch.autograd.grad(edge, [flat, *gradients.parameters], dlogits, allow_unused=True)
    gradients.add(dparameters)
    return loss, dx.view_as(x)
