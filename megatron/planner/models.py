"""Model presets by name."""

from __future__ import annotations

from typing import Any

from megatron.config import ModelConfig

_LLAMA: dict[str, Any] = {
    "use_rotary_position_embeddings": True, "normalization": "rmsnorm", "swiglu": True, "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}  # fmt: skip
_GPT: dict[str, Any] = {"use_rotary_position_embeddings": True, "untie_embeddings_and_output_weights": True}

# name: (vocabulary, layers, hidden size, query heads, further fields)
_SHAPES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "gpt-1.3b": (50304, 24, 2048, 16, _GPT),
    "gpt-2.7b": (50304, 32, 2560, 32, _GPT),
    "gpt-6.7b": (50304, 32, 4096, 32, _GPT),
    "gpt-13b": (50304, 40, 5120, 40, _GPT),
    "gpt-30b": (50304, 48, 7168, 56, _GPT),
    "llama-3b": (
        128256,
        28,
        3072,
        24,
        _LLAMA | {"num_key_value_heads": 8, "ffn_hidden_size": 8192, "untie_embeddings_and_output_weights": False},
    ),
    "llama-8b": (128256, 32, 4096, 32, _LLAMA | {"num_key_value_heads": 8, "ffn_hidden_size": 14336}),
    "llama-70b": (128256, 80, 8192, 64, _LLAMA | {"num_key_value_heads": 8, "ffn_hidden_size": 28672}),
}
MODEL_NAMES = tuple(_SHAPES)


def named_model(name: str, seq_length: int) -> tuple[ModelConfig, int]:
    """Return (model, vocabulary size) of a name in MODEL_NAMES."""
    vocabulary, layers, hidden, heads, further = _SHAPES[name]
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=seq_length, **further
    )
    return model.resolved(), vocabulary
