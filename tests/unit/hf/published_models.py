"""Tiny random models of many families, as transformers builds and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "head_dim": 16, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "phi3": {},
    "deepseek_v3": {**_EXPERTS, **_MLA, **_GROUPS, "num_key_value_heads": 4},
    "glm4_moe": {**_EXPERTS, **_GROUPS, "head_dim": 16, "use_qk_norm": True},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


def random_model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Build a model as transformers initializes it."""
    config = CONFIG_MAPPING[family](**{**_COMMON, **FAMILIES[family], **settings})
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Build a model with random values in every parameter and buffer that is saved."""
    torch.manual_seed(1)
    model = random_model(family, **settings)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 8)
    nn.Module.to(model, dtype)
    return model


def published(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Save a tiny model into `folder`, and return it as transformers loads it."""
    tiny_model(family, dtype).save_pretrained(folder, **settings)
    return loaded(folder)


def loaded(folder: Path, **settings: Any) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, **settings))
