"""Settings for the model: its architecture, initialization, dropout and attention kernel."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from megatron.config.sizes import ModelSizes, TokenWeights

AttentionBackendName = Literal[
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
Activation = Literal["gelu", "gelu_tanh", "swiglu"]
Normalization = Literal["layernorm", "rmsnorm"]
RopeScaling = Literal["none", "linear", "dynamic", "yarn", "llama3"]
TokenCount = Annotated[int, "tokens of a length, which a flag writes as 131072 or 128K"]

# The parameters that each RoPE scaling type uses.
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

# Activations act(gate) * up: the MLP's first layer has two outputs for each input of its last layer.
GATED_ACTIVATIONS: tuple[Activation, ...] = ("swiglu",)
GATED_WIDTH_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model architecture.

    A width that is derived from others is 0 until `resolved` fills it in.
    """

    hf_model: str | None = None
    """Folder of a Hugging Face model, which defines architecture and tokenizer. Flags of the architecture are then
    refused; FPDT, offloading, ranks per sequence and --zero-stage 3 are chosen where no flag gives them."""

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

    seq_length: TokenCount
    """Tokens per training sequence, over all sequence-parallel ranks together, such as 131072 or 128K."""

    max_position_embeddings: TokenCount = 0
    """Longest sequence the model has positions for. Default: --seq-length."""

    use_rotary_position_embeddings: bool = False
    """Use rotary position embeddings (RoPE) instead of learned ones."""

    no_position_embedding: bool = False
    """No learned position embeddings; needs --use-rotary-position-embeddings, which has none."""

    rotary_percent: float = 1.0
    """Share of each head's width that RoPE rotates."""

    rotary_position_embeddings_theta: float = 10000.0
    """Base of the RoPE angles."""

    rope_scaling_type: RopeScaling = "none"
    """RoPE scaling for a context longer than the original one. linear divides every position by the factor (position
    interpolation); dynamic increases theta by how far --seq-length exceeds the original context (NTK); yarn and llama3
    divide only the low frequencies, and yarn scales attention too."""

    rope_scaling_factor: float | None = None
    """Ratio of the target context to the original context; needed by every --rope-scaling-type but none."""

    rope_scaling_original_max_position_embeddings: TokenCount | None = None
    """Original context that the model was trained at, in tokens; needed by dynamic, yarn and llama3."""

    rope_scaling_low_freq_factor: float = 1.0
    """llama3: dimensions that rotate fewer times than this within the original context are divided by the factor."""

    rope_scaling_high_freq_factor: float = 4.0
    """llama3: dimensions that rotate more often than this within the original context are unchanged."""

    rope_scaling_beta_fast: float = 32.0
    """yarn: dimensions that rotate more often than this within the original context are unchanged."""

    rope_scaling_beta_slow: float = 1.0
    """yarn: dimensions that rotate fewer times than this within the original context are divided by the factor."""

    rope_scaling_attention_factor: float | None = None
    """yarn: factor that multiplies the rotated queries and the rotated keys. Default: 0.1 ln(factor) + 1."""

    rope_scaling_mscale: float | None = None
    """yarn: m in the attention factor (0.1 m ln(factor) + 1) / (0.1 n ln(factor) + 1); n is
    --rope-scaling-mscale-all-dim."""

    rope_scaling_mscale_all_dim: float | None = None
    """yarn: n in the attention factor; see --rope-scaling-mscale."""

    normalization: Normalization = "layernorm"
    """Normalization before attention, before the MLP and before the head."""

    layernorm_epsilon: float = 1e-5
    """Epsilon added to the variance (or the mean square) under the square root."""

    qk_layernorm: bool = False
    """Normalize each query and key over the width of its head, before RoPE; all heads share one weight."""

    swiglu: bool = False
    """Use SwiGLU in the MLP instead of GELU."""

    parallel_residual: bool = False
    """Parallel attention and MLP, x + attention(norm x) + mlp(norm x), each with its own norm, as in GPT-NeoX."""

    openai_gelu: bool = False
    """Use the tanh approximation of GELU, as GPT-2 and Megatron's fused GELU do, instead of the error function."""

    disable_bias_linear: bool = False
    """No biases in linear layers."""

    add_qkv_bias: bool = False
    """Add biases to the q, k and v projections despite --disable-bias-linear."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of sharing the word embedding's."""

    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this."""

    attention_dropout: float = 0.0
    """Dropout on attention probabilities. Megatron's default is 0.1, which is unusual in long-context training."""

    hidden_dropout: float = 0.0
    """Dropout on the embedding and on each addition to the residual stream. Megatron's default is 0.1."""

    init_method_std: float = 0.02
    """Standard deviation of the normal distribution that weights are initialized from."""

    attention_backend: AttentionBackendName = "auto"
    """Attention kernel; auto selects the fastest that supports the device, dtype and head width. The flash-attn-
    backends need their own packages; flash-2 is flash-attn-2 where it is supported, and torch-flash elsewhere."""

    use_flash_attn: bool = False
    """The fastest available kernel: the same as --attention-backend auto."""

    use_flash_attn_v2: bool = False
    """FlashAttention-2, from the flash-attn package or from torch: the same as --attention-backend flash-2."""

    use_flash_attn_v3: bool = False
    """FlashAttention-3: the same as --attention-backend flash-attn-3."""

    use_flash_attn_v4: bool = False
    """flash-attn-4: the same as --attention-backend flash-attn-4."""

    @property
    def activation(self) -> Activation:
        """The activation of the MLP."""
        if self.swiglu:
            return "swiglu"
        return "gelu_tanh" if self.openai_gelu else "gelu"

    @property
    def mlp_outputs(self) -> int:
        """Outputs of the MLP's first layer: gate and up for a gated activation."""
        return self.ffn_hidden_size * (2 if self.activation in GATED_ACTIVATIONS else 1)

    @property
    def sizes(self) -> ModelSizes:
        """The sizes that memory, FLOPs and time depend on."""
        queries, keys = (n * self.kv_channels for n in (self.num_attention_heads, self.num_key_value_heads))
        projection_width = queries + 2 * keys
        block_weights = self.hidden_size * (projection_width + queries + self.mlp_outputs + self.ffn_hidden_size)
        saves_output = not self.parallel_residual
        in_all_blocks = self.num_layers * self.hidden_size
        learned_positions = 0 if self.use_rotary_position_embeddings else self.max_position_embeddings
        return ModelSizes(
            all_block_weights=self.num_layers * block_weights,
            block_weights=block_weights,
            outer_weights=learned_positions * self.hidden_size,
            token_weights=TokenWeights(
                before=in_all_blocks * projection_width,
                output=in_all_blocks * queries * saves_output,
                mlp=in_all_blocks * self.mlp_outputs,
                last=in_all_blocks * (self.ffn_hidden_size + queries * (not saves_output)),
            ),
            projection_width=projection_width,
            normalizes_products=self.qk_layernorm,
            saves_output=saves_output,
            saved_mlp_outputs=self.mlp_outputs,
            mlp_outputs=self.mlp_outputs,
            mlp_width=self.ffn_hidden_size,
            narrow_channels=self.kv_channels,
        )

    def num_rows(self, vocab_size: int) -> int:
        """Return the rows of the embedding for a tokenizer with so many ids."""
        return -(-vocab_size // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by

    def resolved(self) -> ModelConfig:
        """Return the same architecture with every width filled in."""
        return replace(
            self,
            ffn_hidden_size=self.ffn_hidden_size or default_ffn_hidden_size(self.hidden_size, self.activation),
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            kv_channels=self.kv_channels or self.hidden_size // max(self.num_attention_heads, 1),
            max_position_embeddings=self.max_position_embeddings or self.seq_length,
        )


# The settings of a model that --hf-model leaves to the user.
_OF_THE_RUN = (
    *("hf_model", "seq_length", "attention_dropout", "hidden_dropout", "attention_backend"),
    *("use_flash_attn", "use_flash_attn_v2", "use_flash_attn_v3", "use_flash_attn_v4"),
)
# Those that its folder defines.
ARCHITECTURE_FLAGS = frozenset(member.name for member in fields(ModelConfig)) - frozenset(_OF_THE_RUN)


def default_ffn_hidden_size(hidden_size: int, activation: Activation) -> int:
    """Return the MLP width that gives about 8 h^2 weights, in two matrices or in the three of a gated activation."""
    if activation not in GATED_ACTIVATIONS:
        return 4 * hidden_size
    two_thirds = int(4 * hidden_size * 2 / 3)
    return max(two_thirds // GATED_WIDTH_MULTIPLE, 1) * GATED_WIDTH_MULTIPLE
