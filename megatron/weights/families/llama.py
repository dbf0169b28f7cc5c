"""LLaMA 1 to 3.2 and similar models: RMSNorm, SwiGLU, rotary positions, separate queries, keys and values.

Mistral is the same under another name. Qwen2 has biases on queries, keys and values. Qwen3 has norms on queries and
keys.
"""

from __future__ import annotations

from typing import Any

from megatron.config import ModelConfig
from megatron.weights.errors import WeightsError
from megatron.weights.families import rope
from megatron.weights.families.family import (
    Family,
    Module,
    Needed,
    gate_and_up,
    grouped_heads,
)
from megatron.weights.families.values import HuggingFaceConfig, count, number, switch

MODULES = {
    "embedding.word_embeddings": Module(("model.embed_tokens",)),
    "layers.*.input_layernorm": Module(("model.layers.*.input_layernorm",)),
    "layers.*.self_attention.query_key_value": Module(
        tuple(f"model.layers.*.self_attn.{part}_proj" for part in "qkv"), grouped_heads
    ),
    "layers.*.self_attention.dense": Module(("model.layers.*.self_attn.o_proj",)),
    "layers.*.post_attention_layernorm": Module(("model.layers.*.post_attention_layernorm",)),
    "layers.*.mlp.dense_h_to_4h": Module(("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"), gate_and_up),
    "layers.*.mlp.dense_4h_to_h": Module(("model.layers.*.mlp.down_proj",)),
    "head.final_layernorm": Module(("model.norm",)),
    "head.output_layer": Module(("lm_head",)),
}
MANAGED = rope.KEYS | {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "pretraining_tp",
}  # fmt: skip


def llama_fields(config: HuggingFaceConfig) -> dict[str, Any]:
    """Convert a LLaMA-like config.json to fields of ModelConfig."""
    heads, hidden_size = count(config, "num_attention_heads"), count(config, "hidden_size")
    return {
        "num_layers": count(config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": count(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": count(config, "num_key_value_heads", heads),
        "kv_channels": count(config, "head_dim", hidden_size // heads),
        "max_position_embeddings": count(config, "max_position_embeddings"),
        "normalization": "rmsnorm",
        "layernorm_epsilon": number(config, "rms_norm_eps", 1e-6, "layernorm_epsilon"),
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": not switch(config, "tie_word_embeddings", default=False),
        **rope.rope_fields(config),
    }


def llama_config(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json for a LLaMA-like model."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        **rope.rope_config(model),
    }


def mistral_fields(config: HuggingFaceConfig) -> dict[str, Any]:
    """Convert Mistral's config.json; WeightsError if the sliding window is smaller than the number of positions."""
    fields = llama_fields(config)
    positions = fields["max_position_embeddings"]
    window = count(config, "sliding_window", positions)
    if window < positions:
        raise WeightsError(
            f"config.json has sliding_window {window} below max_position_embeddings {positions}, and attention over "
            "the whole context is supported: sliding_window null."
        )
    return fields


def qwen2_fields(config: HuggingFaceConfig) -> dict[str, Any]:
    """Convert Qwen2's config.json to fields of ModelConfig."""
    return {**llama_fields(config), "add_qkv_bias": True}


def qwen3_fields(config: HuggingFaceConfig) -> dict[str, Any]:
    """Convert Qwen3's config.json to fields of ModelConfig."""
    return {**llama_fields(config), "qk_layernorm": True}


_SILU = Needed("hidden_act", ("silu",))
_NO_BIAS = Needed("attention_bias", (False,))
_NO_WINDOW = Needed("use_sliding_window", (False,))
_BUFFERS = ("rotary_emb.inv_freq",)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    modules=MODULES,
    to_fields=llama_fields,
    to_config=llama_config,
    needed=(_SILU, _NO_BIAS, Needed("mlp_bias", (False,))),
    managed=MANAGED,
    buffers=_BUFFERS,
    fixed={"attention_bias": False, "mlp_bias": False},
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    modules=MODULES,
    to_fields=mistral_fields,
    to_config=llama_config,
    needed=(_SILU,),
    managed=MANAGED,
    buffers=_BUFFERS,
    fixed={"sliding_window": None},
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    modules=MODULES,
    to_fields=qwen2_fields,
    to_config=llama_config,
    needed=(_SILU, _NO_WINDOW),
    managed=MANAGED,
    buffers=_BUFFERS,
    fixed={"use_sliding_window": False},
    defaults={"num_key_value_heads": 32},
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    modules=MODULES
    | {
        "layers.*.self_attention.q_layernorm": Module(("model.layers.*.self_attn.q_norm",)),
        "layers.*.self_attention.k_layernorm": Module(("model.layers.*.self_attn.k_norm",)),
    },
    to_fields=qwen3_fields,
    to_config=llama_config,
    needed=(_SILU, _NO_BIAS, _NO_WINDOW),
    managed=MANAGED,
    buffers=_BUFFERS,
    fixed={"attention_bias": False, "use_sliding_window": False},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
