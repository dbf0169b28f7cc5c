"""A small random model of every family in transformers, and the same model here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron.core.parallel_state import ParallelState
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.weights.families import family_of
from megatron.weights.portable_config import PortableConfig
from megatron.weights.safetensors_folder import SafetensorsFolder

VOCAB = 61
POSITIONS = 48

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": POSITIONS, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 44, "n_positions": POSITIONS,
    "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
# Numbers with which every part of each scaling has an effect within POSITIONS.
_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 3.0},
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
}  # fmt: skip
_GPT_NEOX = {key: value for key, value in _SIZES.items() if key not in ("num_key_value_heads", "head_dim")}

# name: (model_type, keys of its config.json)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-tied": ("llama", _SIZES | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama-multi-head": ("llama", _SIZES | {"num_key_value_heads": 4, "head_dim": 8}),
    **{
        f"llama-{name}": ("llama", _SIZES | {"rope_parameters": {"rope_theta": 500.0} | scaling})
        for name, scaling in _SCALINGS.items()
    },
    "mistral": ("mistral", _SIZES | {"sliding_window": None, "num_key_value_heads": 1}),
    "mistral-wide-window": ("mistral", _SIZES | {"sliding_window": POSITIONS}),
    "qwen2": ("qwen2", {key: value for key, value in _SIZES.items() if key != "head_dim"}),
    "qwen2-tied": ("qwen2", _SIZES | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _SIZES),
    "qwen3-tied": ("qwen3", _SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", _GPT2),
    "pythia": ("gpt_neox", _GPT_NEOX),
    "gpt-neox": ("gpt_neox", _GPT_NEOX | {"hidden_act": "gelu_fast", "use_parallel_residual": False}),
    "gpt-neox-tied": (
        "gpt_neox",
        _GPT_NEOX
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "gpt2-default-width": ("gpt2", _GPT2 | {"n_inner": None}),
}


def small_model(name: str, **changes: Any) -> nn.Module:
    """Build a transformers model in fp32 with every parameter random: none zero or one."""
    model_type, keys = CASES[name]
    config = CONFIG_MAPPING[model_type](**keys | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        offset = 1.0 if parameter.dim() == 1 else 0.0
        parameter.data = offset * 0.5 + 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save(name: str, folder: Path, **changes: Any) -> nn.Module:
    """Write a small model, its config changed, as transformers does, and return it."""
    model = small_model(name, **changes)
    model.save_pretrained(folder)
    return model


def read_portable(folder: Path) -> tuple[PortableConfig, SafetensorsFolder]:
    """Read the tensors of a folder of portable weights."""
    weights = SafetensorsFolder(folder)
    return PortableConfig.read(folder, weights.shape("embedding.word_embeddings.weight")[0]), weights


def load_here(folder: Path, execution: Execution, seq_length: int) -> nn.Module:
    """Build our model of a folder of portable weights, in fp32."""
    portable, weights = read_portable(folder)
    config = replace(portable.model, seq_length=seq_length)
    model = build_model(config, portable.padded_vocab_size, ParallelState(), execution, Initialization(torch.float32))
    state = {name: weights.get(name) for name in weights.names}
    tied = set() if config.untie_embeddings_and_output_weights else {"head.output_layer.weight"}
    faults = model.load_state_dict(state, strict=False)
    assert set(faults.missing_keys) == tied
    assert not faults.unexpected_keys
    return model


def our_logits(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """[B, S, V], from the same modules that give the loss."""
    positions_BS = torch.arange(tokens_BS.shape[1]).expand(tokens_BS.shape)
    with torch.no_grad():
        x_SBh = model.embedding(tokens_BS, positions_BS, torch.zeros(()))
        for layer in model.layers:
            x_SBh = layer(x_SBh, positions_BS)
        return model.head.output_layer(model.head.final_layernorm(x_SBh)).transpose(0, 1)


def in_their_names(tensors: Mapping[str, Tensor], portable: PortableConfig) -> dict[str, Tensor]:
    """Split our parameters, or their gradients, into the tensors of transformers, without the padding."""
    model_type = (portable.hugging_face or {})["model_type"]
    family = family_of(model_type)
    result = {}
    for ours, tensor in tensors.items():
        names, arrange = family.names(ours)
        rows = portable.vocab_size if tensor.shape[0] == portable.padded_vocab_size else tensor.shape[0]
        parts = arrange(portable.model).split(tensor[:rows])
        result.update({family.prefixes[0] + name: part for name, part in zip(names, parts, strict=True)})
    if "embed_out.weight" in result:  # what GPT-NeoX's files call it; transformers 5 renames it when it loads them
        result["lm_head.weight"] = result.pop("embed_out.weight")
    return result
