"""What the model is: everything that decides its parameters and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

AttentionBackend = Literal[
    "auto",
    "reference",
    "torch-cpu",
    "torch-flash",
    "cudnn",
    "flash-2",
    "flash-attn-2",
    "flash-attn-3",
    "flash-attn-4",
]
Normalization = Literal["layernorm", "rmsnorm"]
RopeScaling = Literal["none", "linear", "dynamic", "yarn", "llama3"]

# What counts with each.
ROPE_SCALING_PARAMETERS: dict[RopeScaling, tuple[str, ...]] = {
    "none": (),
    "linear": ("rope_scaling_factor",),
    "dynamic": ("rope_scaling_factor", "rope_scaling_original_max_position_embeddings"),
    "yarn": (
        "rope_scaling_factor",
        "rope_scaling_original_max_position_embeddings",
        "rope_scaling_beta_fast",
        "rope_scaling_beta_slow",
        "rope_scaling_attention_factor",
        "rope_scaling_mscale",
        "rope_scaling_mscale_all_dim",
    ),
    "llama3": (
        "rope_scaling_factor",
        "rope_scaling_original_max_position_embeddings",
        "rope_scaling_low_freq_factor",
        "rope_scaling_high_freq_factor",
    ),
}

SWIGLU_WIDTH_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model architecture.

    A width that follows from others is 0 until `resolved` fills it in.
    """

    num_layers: int
    """Number of transformer blocks."""

    hidden_size: int
    """Width of the residual stream."""

    ffn_hidden_size: int = 0
    """Inner width of the MLP. Default: 4 x hidden size; with --swiglu 2/3 of that, rounded down to a multiple of 64."""

    num_attention_heads: int
    """Number of query heads."""

    num_key_value_heads: int = 0
    """Number of key/value heads (grouped-query attention); divides the query heads. Default: as many as query heads."""

    kv_channels: int = 0
    """Width of one attention head. Default: hidden size / number of query heads."""

    seq_length: int
    """Tokens per training sequence, over all sequence-parallel ranks together."""

    max_position_embeddings: int = 0
    """Longest sequence the model has positions for. Default: --seq-length."""

    use_rotary_position_embeddings: bool = False
    """Rotary position embeddings (RoPE) in place of a learned table."""

    no_position_embedding: bool = False
    """No learned table of positions; needs --use-rotary-position-embeddings, with which there is none."""

    rotary_percent: float = 1.0
    """Share of each head's width that RoPE rotates."""

    rotary_position_embeddings_theta: float = 10000.0
    """Base of the RoPE angles."""

    rope_scaling_type: RopeScaling = "none"
    """How RoPE is stretched for a context longer than the one trained at. linear divides every position by the factor
    (position interpolation); dynamic enlarges theta by what --seq-length exceeds the original context (NTK); yarn and
    llama3 divide the slow frequencies alone, and yarn scales attention too."""

    rope_scaling_factor: float | None = None
    """How many times the original context is to be reached; needed by every --rope-scaling-type but none."""

    rope_scaling_original_max_position_embeddings: int | None = None
    """Context that the model was trained at before, in tokens; needed by dynamic, yarn and llama3."""

    rope_scaling_low_freq_factor: float = 1.0
    """llama3: dimensions that turn fewer times than this within the original context are divided by the factor."""

    rope_scaling_high_freq_factor: float = 4.0
    """llama3: dimensions that turn more often than this within the original context stay as they are."""

    rope_scaling_beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this within the original context stay as they are."""

    rope_scaling_beta_slow: float = 1.0
    """yarn: dimensions that turn fewer times than this within the original context are divided by the factor."""

    rope_scaling_attention_factor: float | None = None
    """yarn: what the rotated queries and keys are each multiplied by. Default: 0.1 ln(factor) + 1."""

    rope_scaling_mscale: float | None = None
    """yarn: together with --rope-scaling-mscale-all-dim, makes the attention factor (0.1 m ln(factor) + 1) / (0.1 n
    ln(factor) + 1), m this and n that."""

    rope_scaling_mscale_all_dim: float | None = None
    """yarn: see --rope-scaling-mscale."""

    normalization: Normalization = "layernorm"
    """Normalisation before attention, before the MLP and before the head."""

    layernorm_epsilon: float = 1e-5
    """Added to the variance (or the mean square) under the root."""

    qk_layernorm: bool = False
    """Normalisation of each query and key over the width of its head, before RoPE; one weight serves all heads."""

    swiglu: bool = False
    """SwiGLU in the MLP in place of GELU."""

    parallel_residual: bool = False
    """Attention and MLP side by side, x + attention(norm x) + mlp(norm x), each with its norm, as in GPT-NeoX."""

    openai_gelu: bool = False
    """GELU's tanh approximation, which GPT-2 and Megatron's fused GELU use, in place of the error function."""

    disable_bias_linear: bool = False
    """No biases in linear layers."""

    add_qkv_bias: bool = False
    """Biases in the projection to queries, keys and values all the same."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer a weight of its own in place of the word embedding's."""

    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this."""

    attention_dropout: float = 0.0
    """Dropout on attention probabilities. Megatron's default is 0.1, which is out of place in long-context training."""

    hidden_dropout: float = 0.0
    """Dropout on the embedding and on what is added to the residual stream. Megatron's default is 0.1."""

    init_method_std: float = 0.02
    """Standard deviation of the normal distribution that weights start from."""

    attention_backend: AttentionBackend = "auto"
    """Attention kernel; auto takes the fastest that is correct for the device, type and head width. The flash-attn-
    ones are packages of their own; flash-2 is flash-attn-2 where it can serve, and torch-flash elsewhere."""

    use_flash_attn: bool = False
    """The fastest kernel that is there: the same as --attention-backend auto."""

    use_flash_attn_v2: bool = False
    """FlashAttention-2, of the flash-attn package or of torch: the same as --attention-backend flash-2."""

    use_flash_attn_v3: bool = False
    """FlashAttention-3: the same as --attention-backend flash-attn-3."""

    use_flash_attn_v4: bool = False
    """flash-attn-4: the same as --attention-backend flash-attn-4."""

    @property
    def block_weights(self) -> int:
        """Numbers in the matrices of one block."""
        query_width, key_value_width = (
            n * self.kv_channels for n in (self.num_attention_heads, self.num_key_value_heads)
        )
        mlp = self.hidden_size * self.ffn_hidden_size * (3 if self.swiglu else 2)
        return self.hidden_size * (2 * query_width + 2 * key_value_width) + mlp

    def resolved(self) -> ModelConfig:
        """Return the same architecture with every width filled in."""
        return replace(
            self,
            ffn_hidden_size=self.ffn_hidden_size or default_ffn_hidden_size(self.hidden_size, self.swiglu),
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            kv_channels=self.kv_channels or self.hidden_size // max(self.num_attention_heads, 1),
            max_position_embeddings=self.max_position_embeddings or self.seq_length,
        )


def default_ffn_hidden_size(hidden_size: int, swiglu: bool) -> int:
    """Return the MLP width that makes about 8 h^2 weights, of GELU's two matrices or of SwiGLU's three."""
    if not swiglu:
        return 4 * hidden_size
    two_thirds = int(4 * hidden_size * 2 / 3)
    return max(two_thirds // SWIGLU_WIDTH_MULTIPLE, 1) * SWIGLU_WIDTH_MULTIPLE
