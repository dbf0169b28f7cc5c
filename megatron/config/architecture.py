"""Architecture compatibility: the fields that two models must share for one to load a checkpoint of the other."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.config.hugging_face import HuggingFaceModelConfig
from megatron.config.model import ROPE_SCALING_PARAMETERS, ModelConfig

ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "kv_channels",
    "use_rotary_position_embeddings",
    "rotary_percent",
    "rotary_position_embeddings_theta",
    "rope_scaling_type",
    "normalization",
    "layernorm_epsilon",
    "qk_layernorm",
    "swiglu",
    "openai_gelu",
    "parallel_residual",
    "disable_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
)
ROTARY_ONLY = ("rotary_percent", "rotary_position_embeddings_theta", "rope_scaling_type")
LEARNED_POSITIONS_ONLY = ("max_position_embeddings",)


def architecture_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that must match when a checkpoint is loaded.

    They exclude the sequence length, dropout and the attention kernel, so training can continue at a longer context.
    They include the number of positions where positions are learned.
    """
    rotary = model.use_rotary_position_embeddings
    unused = () if rotary else ROTARY_ONLY
    extra = ROPE_SCALING_PARAMETERS[model.rope_scaling_type] if rotary else LEARNED_POSITIONS_ONLY
    return {name: getattr(model, name) for name in (*ARCHITECTURE, *extra) if name not in unused}


def with_rope_of(other: ModelConfig, model: ModelConfig) -> ModelConfig:
    """Return `model` with the RoPE theta and scaling of `other`, which may change when the context is extended."""
    names = ["rotary_position_embeddings_theta", "rope_scaling_type", *ROPE_SCALING_PARAMETERS[other.rope_scaling_type]]
    return replace(model, **{name: getattr(other, name) for name in names})


def describe_difference(checkpoint: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """Return "--hidden-size is 1024 in the checkpoint and 2048 in the flags; ..." for fields that differ, or ""."""
    names = [name for name in dict.fromkeys((*checkpoint, *flags)) if checkpoint.get(name) != flags.get(name)]
    return "; ".join(
        f"--{name.replace('_', '-')} is {_shown(checkpoint, name)} in the checkpoint and {_shown(flags, name)} in "
        "the flags"
        for name in names
    )


def describe_mismatch(saved: ModelConfig, model: ModelConfig, change_rope: bool) -> str:
    """Return why a run of `model` cannot load weights of `saved`, with a remedy if there is one, or ""."""
    if isinstance(saved, HuggingFaceModelConfig) and isinstance(model, HuggingFaceModelConfig):
        return model.difference(saved, change_rope)
    if isinstance(saved, HuggingFaceModelConfig) or isinstance(model, HuggingFaceModelConfig):
        return f"it has {_described(saved)}, and this run has {_described(model)}"
    with_own_rope = with_rope_of(model, saved)
    own = architecture_fields(model)
    difference = describe_difference(architecture_fields(with_own_rope if change_rope else saved), own)
    only_rope = difference and architecture_fields(with_own_rope) == own
    return difference + ("; add --change-rope to continue training with the RoPE of the flags" if only_rope else "")


def _described(model: ModelConfig) -> str:
    return f"the {model.model_type} of --hf-model" if isinstance(model, HuggingFaceModelConfig) else "a model of flags"


def _shown(values: Mapping[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "absent"
