"""The modules of a transformer block: linear layers, norms, self-attention, MLP.

S tokens, B batch, h hidden size, H query heads, K key/value heads, D head size, f MLP width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.config.model import Activation
from megatron.core.documents import Documents
from megatron.core.head_layout import HeadLayout
from megatron.model.initialization import Initializer
from megatron.model.rotary import build_rotary
from megatron.ops.attention import AttentionRequest, AttentionUnavailable, AttentionVariant
from megatron.ops.linear import linear
from megatron.ops.rope import split_and_rotate
from megatron.ops.swiglu import swiglu


class Linear(nn.Module):
    """y = x W^T + b, W [out, in]; the weight may be another module's."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        initializer: Initializer,
        bias: bool,
        into_residual: bool = False,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.weight = initializer.normal(outputs, inputs, into_residual=into_residual) if weight is None else weight
        self.bias = initializer.zeros(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Row lookup in a table [rows, h]."""

    def __init__(self, rows: int, hidden_size: int, initializer: Initializer) -> None:
        super().__init__()
        self.weight = initializer.normal(rows, hidden_size)

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)


def build_norm(config: ModelConfig, initializer: Initializer, size: int | None = None) -> nn.Module:
    """Build the configured LayerNorm or RMSNorm over `size`, by default the hidden size."""
    norm = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[config.normalization]
    size = size or config.hidden_size
    return norm(size, eps=config.layernorm_epsilon, dtype=initializer.dtype, device=initializer.device)


def attention_variant(config: ModelConfig) -> AttentionVariant:
    """Return how the tokens of a sequence attend to each other."""
    return AttentionVariant(scale=config.kv_channels**-0.5, softcap=config.sizes.softcap)


def attention_request(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> AttentionRequest:
    """Return what the model asks of an attention backend; deterministic if torch's algorithms have to be."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return AttentionRequest(device, dtype, config.kv_channels, _attention_variants(config), deterministic)


def _attention_variants(config: ModelConfig) -> tuple[AttentionVariant, ...]:
    """Return the variants of all blocks, each once."""
    sizes, variant = config.sizes, attention_variant(config)
    limits = zip_longest(sizes.windows, sizes.local_blocks)
    variants = [replace(variant, window=window, local_block=block) for window, block in limits]
    return tuple(dict.fromkeys(variants)) or (variant,)


def head_layout(config: ModelConfig, num_ranks: int) -> HeadLayout:
    """Return the heads over the ranks of a sequence. AttentionUnavailable if ranks share rows that have dropout."""
    heads = HeadLayout(config.num_attention_heads, config.num_key_value_heads, num_ranks)
    if config.attention_dropout and heads.num_row_shares > 1:
        sizes = [str(size) for size in range(1, heads.num_heads + 1) if heads.num_heads % size == 0]
        raise AttentionUnavailable(
            f"--attention-dropout ({config.attention_dropout:g}) must be 0 where ranks share the rows of a head, as "
            f"{num_ranks} ranks do with --num-attention-heads ({heads.num_heads}); use --attention-dropout 0, or "
            f"--ds-sequence-parallel-size {', '.join(sizes)}"
        )
    return heads


def has_short_tiles(config: ModelConfig, num_ranks: int, documents: bool) -> bool:
    """Whether attention has tiles of any length: of documents, or of the rows that ranks share."""
    return documents or head_layout(config, num_ranks).num_row_shares > 1


class CoreAttention(Protocol):
    """Attention between the projections: Ulysses (megatron.model.plain) or FPDT (megatron.fpdt.seam)."""

    def __call__(
        self,
        q_SBHD: Tensor,
        kv_SBKD: Tensor,
        variant: AttentionVariant,
        dropout: float,
        documents: Documents | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Return o [S, B, H, D] of this rank's tokens for q [S, B, H, D] and kv [S, B, 2K, D], keys first.

        A token attends as `variant` says, within its own document if `documents` are given. The sinks are a score per
        head that joins the softmax of every query, without a value.
        """
        ...


class SelfAttention(nn.Module):
    """Projections around `core_attention`.

    Rows of `query_key_value`: for each key/value head its H/K query heads, the key, the value. If queries and keys are
    normalized (QK norm), each of the two has one norm for all its heads.
    """

    core_attention: CoreAttention
    """Set by the execution that the builder chooses."""

    def __init__(self, config: ModelConfig, initializer: Initializer) -> None:
        super().__init__()
        self.dropout, self.variant = config.attention_dropout, attention_variant(config)
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.kv_channels
        bias = not config.disable_bias_linear
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_size
        self.query_key_value = Linear(config.hidden_size, rows, initializer, bias or config.add_qkv_bias)
        self.q_layernorm, self.k_layernorm = (
            build_norm(config, initializer, self.head_size) if config.qk_layernorm else None for _ in "qk"
        )
        self.dense = Linear(self.num_heads * self.head_size, config.hidden_size, initializer, bias, into_residual=True)
        self.rotary = build_rotary(config)

    def forward(self, x_SBh: Tensor, positions_BS: Tensor, documents: Documents | None) -> Tensor:
        """Project, attend and project back: [S, B, h] -> [S, B, h]."""
        q, kv = self.project(x_SBh, positions_BS)
        dropout = self.dropout if self.training else 0.0
        o_SBHD = self.core_attention(q, kv, self.variant, dropout, documents)
        return self.dense(o_SBHD.flatten(2))

    def project(self, x_SBh: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Project to q [S, B, H, D] and kv [S, B, 2K, D], K keys and then K values.

        Queries and keys are normalized if the model has QK norm, and rotated by their positions if it has RoPE.
        """
        per_group = self.num_heads // self.num_key_value_heads
        qkv = self.query_key_value(x_SBh)
        qkv = qkv.view(*qkv.shape[:2], self.num_key_value_heads, per_group + 2, self.head_size)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k, v = qkv.split([per_group, 1, 1], 3)
            qkv = torch.cat([self.q_layernorm(q), self.k_layernorm(k), v], 3)
        cos, sin = (None, None) if self.rotary is None else self.rotary.cos_sin(positions_BS, x_SBh.dtype)
        return split_and_rotate(qkv, cos, sin)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": swiglu,
}


class MLP(nn.Module):
    """Two linear layers with an activation between them; a gated one has gate and up stacked in `dense_h_to_4h`."""

    def __init__(self, config: ModelConfig, initializer: Initializer) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        width, bias = config.ffn_hidden_size, not config.disable_bias_linear
        self.dense_h_to_4h = Linear(config.hidden_size, config.mlp_outputs, initializer, bias)
        self.dense_4h_to_h = Linear(width, config.hidden_size, initializer, bias, into_residual=True)

    def forward(self, x_SBh: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x_SBh)))
