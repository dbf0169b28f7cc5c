"""Plain execution, without chunks: Ulysses, or a single device. The residual stream is on the compute device.

Embedding and head are the streamed ones, with one chunk, so full-length logits never exist on any path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.core.collectives import (
    QUERIES_KEYS_VALUES,
    differentiable_heads_to_tokens,
    differentiable_tokens_to_heads,
)
from megatron.core.documents import Documents, Mask, Region, in_local_blocks, tile_regions
from megatron.core.ranges import ATTENTION, TOKEN_WISE, named_range
from megatron.fpdt.loss import StreamableHead, stream_loss
from megatron.fpdt.observer import ATTENTION_OUTPUT, INPUT, OUTPUT, PROJECTED
from megatron.fpdt.stream import Stream
from megatron.fpdt.tokenwise import StreamableEmbedding, stream_embedding
from megatron.ops.attention import (
    QKV,
    AttentionBackend,
    AttentionOutput,
    AttentionVariant,
    backward_regions,
    forward_regions,
    region_of,
)
from megatron.ops.merge import check_sinks, merge_sinks_, sink_gradients

if TYPE_CHECKING:
    from megatron.model.transformer import ExecutableLayer


class PlainExecution:
    """Runs a layer on the whole sequence; activations are saved, or recomputed from inputs on the device or host."""

    def __init__(self, stream: Stream, activation_checkpointing: bool = False, checkpoint_in_cpu: bool = False) -> None:
        """`stream` has one chunk and stores it on the device; it runs embedding and head."""
        self.stream = stream
        self.store = stream.store
        self._activation_checkpointing = activation_checkpointing
        self._checkpoint_in_cpu = checkpoint_in_cpu

    def attach(self, layer: ExecutableLayer) -> None:
        """Replace the layer's `forward` and its core attention."""
        number = layer.layer_number
        layer.set_core_attention(UlyssesAttention(self.stream, number))
        layer.forward = partial(self._run, number, partial(self._run_layer, number, layer.forward))

    def embedding(self, module: StreamableEmbedding, tokens_BS: Tensor, positions_BS: Tensor, anchor: Tensor) -> Tensor:
        return stream_embedding(self.stream, module, tokens_BS, positions_BS, anchor)

    def loss(self, module: StreamableHead, x_SBh: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return stream_loss(self.stream, module, x_SBh, labels_BS, mask_BS)

    def _run(
        self,
        layer_number: int,
        layer: Callable[..., Tensor],
        x_SBh: Tensor,
        positions_BS: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        """Run a layer, with or without activation checkpointing."""
        args = x_SBh, self.stream.on_device(positions_BS), documents
        note_gradients(self.stream, layer_number, (INPUT,), x_SBh)
        if not (self._activation_checkpointing and torch.is_grad_enabled()):
            return layer(*args)
        if not self._checkpoint_in_cpu:
            return checkpoint(layer, *args, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu(pin_memory=x_SBh.is_cuda):
            return checkpoint(layer, *args, use_reentrant=False)

    def _run_layer(self, layer_number: int, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        with self.stream.chunk("forward", layer_number, 0), named_range(TOKEN_WISE):
            return self.stream.noted("forward", OUTPUT, layer_number, 0, forward(*args))


class UlyssesAttention:
    """All-to-all, causal attention over all tokens of the sequence for this rank's heads, all-to-all back."""

    def __init__(self, stream: Stream, layer_number: int) -> None:
        self._stream, self._layer_number = stream, layer_number

    def __call__(
        self,
        q_SBHD: Tensor,
        kv_SBKD: Tensor,
        variant: AttentionVariant,
        dropout: float,
        documents: Documents | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Attend as megatron.model.layers.CoreAttention says."""
        check_sinks(sinks_H, q_SBHD)
        _check_dropout(dropout, variant, sinks_H)
        group, heads = self._stream.parallel_state.sequence_parallel_group, self._stream.heads
        length = len(q_SBHD) * heads.num_ranks
        documents = in_local_blocks(documents, variant.local_block, length)
        regions = tile_regions(documents, self._stream.rows.spans(length), (0, length), variant.window)
        self._note(PROJECTED, q_SBHD, kv_SBKD)
        projected = [q_SBHD, heads.repeated_keys_and_values(kv_SBKD)]
        q, kv = differentiable_tokens_to_heads(projected, group, heads, QUERIES_KEYS_VALUES)
        qkv = QKV(q, *kv.chunk(2, 2))
        sinks = None if sinks_H is None else self._stream.own_entries(sinks_H)
        o = (
            _attention_with_dropout(qkv, dropout, variant, regions)
            if dropout
            else _Attention.apply(*qkv, sinks, self._stream.attention, variant, regions)
        )
        self._note((ATTENTION_OUTPUT,), o)
        return differentiable_heads_to_tokens([o], group, heads)[0]

    def _note(self, names: Sequence[str], *values: Tensor) -> None:
        """Show the values to the observer, and their gradients once they are computed."""
        for what, value in zip(names, values, strict=True):
            self._stream.observer.note("forward", what, self._layer_number, 0, value)
        note_gradients(self._stream, self._layer_number, names, *values)


def note_gradients(stream: Stream, layer_number: int, names: Sequence[str], *values: Tensor) -> None:
    """Show the gradients of values to the observer once they are computed."""
    for what, value in zip(names, values, strict=True):
        if value.requires_grad:
            value.register_hook(partial(stream.observer.note, "backward", what, layer_number, 0))


def _check_dropout(dropout: float, variant: AttentionVariant, sinks_H: Tensor | None) -> None:
    """Raise ValueError for attention that torch's own with dropout would ignore."""
    if dropout and not (variant.softcap is None and variant.window is None and sinks_H is None):
        raise ValueError(
            f"attention dropout ({dropout:g}) cannot be combined with a softcap, a sliding window or sinks; use 0"
        )


def _attention_with_dropout(qkv: QKV, dropout: float, variant: AttentionVariant, regions: tuple[Region, ...]) -> Tensor:
    o_SBHD = torch.zeros_like(qkv.q)
    for region in regions:
        inputs = region_of(qkv, region)
        q, k, v = (t.permute(1, 2, 0, 3) for t in inputs)  # [S, B, H, D] -> [B, H, S, D]
        o = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=region.mask is Mask.CAUSAL, scale=variant.scale, enable_gqa=True
        )
        o_SBHD[region.in_queries] = o.permute(2, 0, 1, 3)
    return o_SBHD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        backend: AttentionBackend,
        variant: AttentionVariant,
        regions: tuple[Region, ...],
    ) -> Tensor:
        with named_range(ATTENTION):
            o, lse = forward_regions(backend, QKV(q, k, v), variant, regions)
            if sinks is not None:
                merge_sinks_(o, lse, sinks)
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, o, lse)
        ctx.backend, ctx.variant, ctx.regions = backend, variant, regions
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, o, lse = ctx.saved_tensors
        (do,), dsinks = grads, None
        with named_range(ATTENTION):
            if ctx.needs_input_grad[3]:
                dsinks = sink_gradients(o, do, lse, sinks).to(sinks.dtype)
            dqkv = backward_regions(ctx.backend, do, QKV(q, k, v), AttentionOutput(o, lse), ctx.variant, ctx.regions)
        return *(grad.to(q.dtype) for grad in dqkv), dsinks, None, None, None
