"""GPT-2: LayerNorm, GELU, learned positions, biases, tied embeddings; weights stored [in, out]."""

from __future__ import annotations

from typing import Any

from megatron.config import ModelConfig
from megatron.weights.families.family import (
    Family,
    Module,
    Needed,
    transposed,
    transposed_heads,
)
from megatron.weights.families.values import HuggingFaceConfig, count, number

_MODULES = {
    "embedding.word_embeddings": Module(("wte",)),
    "embedding.position_embeddings": Module(("wpe",)),
    "layers.*.input_layernorm": Module(("h.*.ln_1",)),
    "layers.*.self_attention.query_key_value": Module(("h.*.attn.c_attn",), transposed_heads),
    "layers.*.self_attention.dense": Module(("h.*.attn.c_proj",), transposed),
    "layers.*.post_attention_layernorm": Module(("h.*.ln_2",)),
    "layers.*.mlp.dense_h_to_4h": Module(("h.*.mlp.c_fc",), transposed),
    "layers.*.mlp.dense_4h_to_h": Module(("h.*.mlp.c_proj",), transposed),
    "head.final_layernorm": Module(("ln_f",)),
}
_ALIASES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip
_MANAGED = frozenset({
    "vocab_size", "n_layer", "n_embd", "n_inner", "n_head", "n_positions", "n_ctx", "layer_norm_epsilon",
    "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop", "tie_word_embeddings", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "add_cross_attention", *_ALIASES,
})  # fmt: skip


def gpt2_fields(config: HuggingFaceConfig) -> dict[str, Any]:
    """Convert GPT-2's config.json to fields of ModelConfig."""
    hidden_size, heads = count(config, "n_embd"), count(config, "n_head")
    return {
        "num_layers": count(config, "n_layer"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": count(config, "n_inner", 4 * hidden_size),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_channels": hidden_size // heads,
        "max_position_embeddings": count(config, "n_positions"),
        "use_rotary_position_embeddings": False,
        "normalization": "layernorm",
        "layernorm_epsilon": number(config, "layer_norm_epsilon", 1e-5, "layernorm_epsilon"),
        "swiglu": False,
        "openai_gelu": True,
        "disable_bias_linear": False,
        "untie_embeddings_and_output_weights": False,
    }


def gpt2_config(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of GPT-2's config.json."""
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    modules=_MODULES,
    to_fields=gpt2_fields,
    to_config=gpt2_config,
    needed=(
        Needed("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
        Needed("tie_word_embeddings", (True,)),
        Needed("scale_attn_weights", (True,)),
        Needed("scale_attn_by_inverse_layer_idx", (False,)),
        Needed("add_cross_attention", (False,)),
    ),
    managed=_MANAGED,
    prefixes=("transformer.", ""),
    buffers=(".attn.bias", ".attn.masked_bias"),
    fixed={"activation_function": "gelu_new", "tie_word_embeddings": True},
    aliases=_ALIASES,
)
