"""Models by name: GPT and LLaMA as flags describe them, and published models by their config.json."""

from __future__ import annotations

from collections.abc import Mapping
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


# Published models: what of their config.json their sizes depend on.
_COLUMNS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_LLAMA_3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN_2: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}
_QWEN_2_SMALL = _QWEN_2 | {"vocab_size": 151936} | _TIED
_QWEN_3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_3_MOE = _QWEN_3 | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "vocab_size": 201088, "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128,
    "max_position_embeddings": 131072,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "head_dim": 128, "sliding_window": None, "max_position_embeddings": 32768,
}  # fmt: skip

# name: (layers, hidden size, query heads, key/value heads, width of the MLP, further settings)
_PUBLISHED: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "Llama-3-8B": (32, 4096, 32, 8, 14336, _LLAMA_3 | {"max_position_embeddings": 8192}),
    "Llama-3-70B": (80, 8192, 64, 8, 28672, _LLAMA_3 | {"max_position_embeddings": 8192}),
    "Llama-3.1-8B": (32, 4096, 32, 8, 14336, _LLAMA_3),
    "Llama-3.1-70B": (80, 8192, 64, 8, 28672, _LLAMA_3),
    "Llama-3.1-405B": (126, 16384, 128, 8, 53248, _LLAMA_3),
    "Llama-3.2-1B": (16, 2048, 32, 8, 8192, _LLAMA_3 | {"head_dim": 64} | _TIED),
    "Llama-3.2-3B": (28, 3072, 24, 8, 8192, _LLAMA_3 | {"head_dim": 128} | _TIED),
    "Llama-3.3-70B": (80, 8192, 64, 8, 28672, _LLAMA_3),
    "Mistral-7B": (32, 4096, 32, 8, 14336, _MISTRAL | {"vocab_size": 32768}),
    "Qwen2.5-0.5B": (24, 896, 14, 2, 4864, _QWEN_2_SMALL),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 8960, _QWEN_2_SMALL),
    "Qwen2.5-3B": (36, 2048, 16, 2, 11008, _QWEN_2_SMALL),
    "Qwen2.5-7B": (28, 3584, 28, 4, 18944, _QWEN_2),
    "Qwen2.5-14B": (48, 5120, 40, 8, 13824, _QWEN_2),
    "Qwen2.5-32B": (64, 5120, 40, 8, 27648, _QWEN_2),
    "Qwen2.5-72B": (80, 8192, 64, 8, 29568, _QWEN_2),
    "Qwen3-0.6B": (28, 1024, 16, 8, 3072, _QWEN_3 | _TIED),
    "Qwen3-1.7B": (28, 2048, 16, 8, 6144, _QWEN_3 | _TIED),
    "Qwen3-4B": (36, 2560, 32, 8, 9728, _QWEN_3 | _TIED),
    "Qwen3-8B": (36, 4096, 32, 8, 12288, _QWEN_3),
    "Qwen3-14B": (40, 5120, 40, 8, 17408, _QWEN_3),
    "Qwen3-32B": (64, 5120, 64, 8, 25600, _QWEN_3),
    "Qwen3-30B-A3B": (48, 2048, 32, 4, 6144, _QWEN_3_MOE | {"moe_intermediate_size": 768}),
    "Qwen3-235B-A22B": (94, 4096, 64, 4, 12288, _QWEN_3_MOE | {"moe_intermediate_size": 1536}),
    "SmolLM2-135M": (30, 576, 9, 3, 1536, _LLAMA_3 | {"vocab_size": 49152, "max_position_embeddings": 8192} | _TIED),
    "SmolLM2-1.7B": (24, 2048, 32, 32, 8192, _LLAMA_3 | {"vocab_size": 49152, "max_position_embeddings": 8192} | _TIED),
    "gpt-oss-20b": (24, 2880, 64, 8, 2880, _GPT_OSS | {"num_local_experts": 32}),
    "gpt-oss-120b": (36, 2880, 64, 8, 2880, _GPT_OSS | {"num_local_experts": 128}),
}
PUBLISHED_NAMES = tuple(_PUBLISHED)
_SAME_SIZES = ("-instruct", "-base", "-hf", "-it", "-2507", "-thinking")  # ends of names of models of one size


def published_config(name: str) -> Mapping[str, Any] | None:
    """Return the config.json of a published model, such as "Qwen3-32B" or "meta-llama/Llama-3.1-8B-Instruct".

    It has the model's sizes alone. None where the name is not known.
    """
    wanted = name.rpartition("/")[2].casefold().removeprefix("meta-")
    while end := next((each for each in _SAME_SIZES if wanted.endswith(each)), ""):
        wanted = wanted.removesuffix(end)
    found = next((each for each in _PUBLISHED if each.casefold() == wanted), None)
    if found is None:
        return None
    *sizes, further = _PUBLISHED[found]
    return dict(zip(_COLUMNS, sizes, strict=True)) | further
