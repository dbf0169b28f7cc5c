"""Construction of the rotary position embedding (RoPE) from a configuration."""

from __future__ import annotations

from megatron.config import ModelConfig
from megatron.ops.rope import RotaryEmbedding
from megatron.ops.rope_scaling import (
    DynamicRotaryEmbedding,
    LinearRotaryEmbedding,
    Llama3RotaryEmbedding,
    YarnRotaryEmbedding,
)


def build_rotary(config: ModelConfig) -> RotaryEmbedding | None:
    """Build the model's RoPE; None if positions are learned. ValueError if the RoPE scaling lacks a value."""
    if not config.use_rotary_position_embeddings:
        return None
    size, theta = rotary_size(config), config.rotary_position_embeddings_theta
    if config.rope_scaling_type == "none":
        return RotaryEmbedding(size, theta)
    factor = _needed(config, "rope_scaling_factor")
    if config.rope_scaling_type == "linear":
        return LinearRotaryEmbedding(size, theta, factor)
    original_length = int(_needed(config, "rope_scaling_original_max_position_embeddings"))
    if config.rope_scaling_type == "dynamic":
        return DynamicRotaryEmbedding(size, theta, factor, original_length, config.seq_length)
    if config.rope_scaling_type == "llama3":
        borders = config.rope_scaling_low_freq_factor, config.rope_scaling_high_freq_factor
        return Llama3RotaryEmbedding(size, theta, factor, original_length, *borders)
    mscale, mscale_all_dim = config.rope_scaling_mscale, config.rope_scaling_mscale_all_dim
    return YarnRotaryEmbedding(
        size,
        theta,
        factor,
        original_length,
        config.rope_scaling_beta_fast,
        config.rope_scaling_beta_slow,
        config.rope_scaling_attention_factor,
        (mscale, mscale_all_dim) if mscale and mscale_all_dim else None,
    )


def rotary_size(config: ModelConfig) -> int:
    """Return the number of dimensions of each head that RoPE rotates."""
    return int(config.kv_channels * config.rotary_percent)


def _needed(config: ModelConfig, name: str) -> float:
    value = getattr(config, name)
    if value is None:
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"--rope-scaling-type {config.rope_scaling_type} needs {flag}; add it")
    return float(value)
