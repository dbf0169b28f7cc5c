"""Models by name, and from a Hugging Face config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.config import ConfigError, ModelConfig

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
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")  # model_type of a config.json whose blocks have LLaMA's sizes


def named_model(name: str, seq_length: int) -> tuple[ModelConfig, int]:
    """(the model, its vocabulary) of a name in MODEL_NAMES or of the path of a config.json.

    Raises:
        ConfigError: there is no such name or file, or the file is not of a LLaMA or GPT that is built here.
    """
    if name in _SHAPES:
        vocabulary, layers, hidden, heads, further = _SHAPES[name]
        model = ModelConfig(
            num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=seq_length, **further
        )
        return model.resolved(), vocabulary
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--model ({name}) is neither a file nor one of {', '.join(MODEL_NAMES)}; give one of them")
    return _from_hugging_face(path, seq_length)


def _from_hugging_face(path: Path, seq_length: int) -> tuple[ModelConfig, int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("model_type", "llama")
        if kind not in _LIKE_LLAMA:
            raise ValueError(f"model_type {kind!r} is none of {', '.join(_LIKE_LLAMA)}")
        heads = content["num_attention_heads"]
        model = ModelConfig(
            num_layers=content["num_hidden_layers"],
            hidden_size=content["hidden_size"],
            ffn_hidden_size=content["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=content.get("num_key_value_heads") or heads,
            kv_channels=content.get("head_dim") or 0,
            seq_length=seq_length,
            **_LLAMA | {"untie_embeddings_and_output_weights": not content.get("tie_word_embeddings", False)},
        )
        return model.resolved(), content["vocab_size"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--model ({path}) is no config.json of a LLaMA ({type(error).__name__}: {error}); give the sizes as flags "
            "of pretrain_gpt.py after --"
        ) from error
