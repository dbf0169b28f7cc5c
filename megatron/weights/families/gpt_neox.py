"""GPT-NeoX and Pythia: LayerNorm, GELU, partial rotary positions, biases, attention and MLP in parallel or in turn.

Queries, keys and values are interleaved head by head. Ours have the same order if every head has its own key and value.
"""

from __future__ import annotations

from typing import Any

from megatron.config import ModelConfig
from megatron.weights.errors import WeightsError
from megatron.weights.families import rope
from megatron.weights.families.family import Family, Module, Needed
from megatron.weights.families.values import HuggingFaceConfig, count, number, switch

_LAYER = "gpt_neox.layers.*"
_MODULES = {
    "embedding.word_embeddings": Module(("gpt_neox.embed_in",)),
    "layers.*.input_layernorm": Module((f"{_LAYER}.input_layernorm",)),
    "layers.*.self_attention.query_key_value": Module((f"{_LAYER}.attention.query_key_value",)),
    "layers.*.self_attention.dense": Module((f"{_LAYER}.attention.dense",)),
    "layers.*.post_attention_layernorm": Module((f"{_LAYER}.post_attention_layernorm",)),
    "layers.*.mlp.dense_h_to_4h": Module((f"{_LAYER}.mlp.dense_h_to_4h",)),
    "layers.*.mlp.dense_4h_to_h": Module((f"{_LAYER}.mlp.dense_4h_to_h",)),
    "head.final_layernorm": Module(("gpt_neox.final_layer_norm",)),
    "head.output_layer": Module(("embed_out",)),
}
_EXACT_GELU = "gelu"
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
_PERCENT = 0.25


def gpt_neox_fields(config: HuggingFaceConfig) -> dict[str, Any]:
    """Convert a GPT-NeoX config.json to fields of ModelConfig."""
    heads, hidden_size = count(config, "num_attention_heads"), count(config, "hidden_size")
    return {
        "num_layers": count(config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": count(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_channels": _head_size(config, hidden_size // heads),
        "max_position_embeddings": count(config, "max_position_embeddings"),
        "normalization": "layernorm",
        "layernorm_epsilon": number(config, "layer_norm_eps", 1e-5, "layernorm_epsilon"),
        "swiglu": False,
        "openai_gelu": config.get("hidden_act", _EXACT_GELU) in _TANH_GELU,
        "disable_bias_linear": False,
        "parallel_residual": switch(config, "use_parallel_residual", default=True),
        "untie_embeddings_and_output_weights": not switch(config, "tie_word_embeddings", default=False),
        **rope.partial_rope_fields(config, "rotary_emb_base", "rotary_pct", _PERCENT),
    }


def _head_size(config: HuggingFaceConfig, derived: int) -> int:
    """Return the head size. transformers uses head_dim of config.json only for the rotation, so it must be equal."""
    given = count(config, "head_dim", derived)
    if given != derived:
        raise WeightsError(
            f"config.json has head_dim {given}, and a head of hidden_size / num_attention_heads = {derived} is "
            "supported; use the model's own config.json."
        )
    return derived


def gpt_neox_config(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPT-NeoX config.json."""
    keys = rope.rope_config(model)
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": _TANH_GELU[0] if model.openai_gelu else _EXACT_GELU,
        "max_position_embeddings": model.max_position_embeddings,
        "layer_norm_eps": model.layernorm_epsilon,
        "use_parallel_residual": model.parallel_residual,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "rotary_emb_base": keys.pop("rope_theta"),
        "rotary_pct": model.rotary_percent,
        **keys,
    }


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    modules=_MODULES,
    to_fields=gpt_neox_fields,
    to_config=gpt_neox_config,
    needed=(Needed("hidden_act", (_EXACT_GELU, *_TANH_GELU)), Needed("attention_bias", (True,))),
    managed=rope.KEYS | {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "layer_norm_eps", "use_parallel_residual", "tie_word_embeddings",
        "rotary_emb_base", "rotary_pct", "attention_bias", "head_dim",
    },
    buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    fixed={"attention_bias": True},
)  # fmt: skip
