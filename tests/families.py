"""The Hugging Face model families that are tested, with real sizes: defaults, or settings like published ones.

`tests/unit/hf/test_proof.py` compares a small copy of each with transformers. Those that have `tiny` settings are also
built by hand, a few kilobytes in size (`tests/unit/hf/tiny_models.py`). `python -m tests.families` writes the
tables of the README and of docs/hugging_face.md from this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from packaging import version
from transformers import CONFIG_MAPPING, PretrainedConfig

REPOSITORY = Path(__file__).parents[1]


class Family(NamedTuple):
    """A model type of transformers, models of it, what is special, and settings that differ from its defaults."""

    model_type: str
    models: str
    special: str
    settings: Mapping[str, Any] = {}

    oldest: str = "5.17"
    """The first version of transformers in which the model calls attention through its interface."""

    tiny: Mapping[str, Any] | None = None
    """What the tiny model has beside the settings that are common to all of them."""

    @property
    def is_streamed(self) -> bool:
        """Whether the installed transformers is as new."""
        return version.parse(transformers.__version__) >= version.parse(self.oldest)

    @property
    def config(self) -> PretrainedConfig:
        return CONFIG_MAPPING[self.model_type](**self.settings)


def _yarn(factor: float, original: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": original,
        **more,
    }


_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Settings of tiny models.
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "head_dim": 4,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0}
GPT_2 = {
    "n_embd": 32, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "tie_word_embeddings": True,
}  # fmt: skip
WINDOW = {"sliding_window": 7}
WINDOWS = WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SOFTCAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12}

FAMILIES = (
    Family(
        "llama",
        "Llama 2 and 3, TinyLlama, SmolLM2, Yi, InternLM3, EXAONE 3",
        "RoPE scaling of Llama 3",
        {"num_key_value_heads": 8, "rope_parameters": _LLAMA_3, "max_position_embeddings": 131072},
        tiny={},
    ),
    Family("mistral", "Mistral 7B, Mistral Small, Nemo", "sliding window", tiny=WINDOW),
    Family(
        "qwen2",
        "Qwen 1.5, 2 and 2.5",
        "biases of q, k and v; sliding window on some layers",
        {"num_key_value_heads": 8, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
        tiny={},
    ),
    Family("qwen3", "Qwen3", "norms of q and k", {"num_key_value_heads": 8, "tie_word_embeddings": True}, tiny={}),
    Family(
        "qwen3_moe",
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        "experts",
        {"norm_topk_prob": True, "head_dim": 128},
        tiny=EXPERTS,
    ),
    Family("mixtral", "Mixtral 8x7B, 8x22B", "experts", tiny=EXPERTS),
    Family(
        "gpt_oss",
        "gpt-oss-20b and 120b",
        "sinks, sliding window on half of the layers, experts with biases, YaRN",
        tiny=EXPERTS | WINDOWS,
    ),
    Family("gemma", "Gemma", "head size 256, tied embeddings", {"num_key_value_heads": 1, "num_attention_heads": 8}),
    Family(
        "gemma2",
        "Gemma 2",
        "softcap of scores and logits, sliding window on half of the layers",
        tiny=WINDOWS | SOFTCAPS,
    ),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        "two RoPEs, norms of q and k, sliding window on five of six layers",
        {"num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240, "sliding_window": 1024},
        tiny=WINDOWS | {"query_pre_attn_scalar": 12},
    ),
    Family(
        "phi3",
        "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
        "sliding window, fused products",
        {"sliding_window": 2047},
        tiny=WINDOW,
    ),
    Family("olmo2", "OLMo 2", "norms after attention and MLP", tiny={}),
    Family(
        "olmo3",
        "OLMo 3",
        "sliding window on three of four layers, YaRN on the others",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                "full_attention": _yarn(8.0, 8192, attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0),
            }
        },
        tiny=WINDOWS,
    ),
    Family("glm4", "GLM-4", "RoPE on half of each head, norms after attention and MLP", tiny={}),
    Family(
        "glm4_moe",
        "GLM-4.5, 4.6, Air",
        "experts, a dense first layer",
        {"use_qk_norm": True, "attention_bias": True},
        tiny=MLA | {"head_dim": 8, "num_key_value_heads": 2},
    ),
    Family(
        "granite",
        "Granite 3",
        "multipliers of embedding, attention, residual and logits",
        {
            "num_key_value_heads": 8,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 16.0,
            "attention_multiplier": 0.0078125,
        },
        tiny=SCALES,
    ),
    Family(
        "cohere2",
        "Command R7B, Command A",
        "parallel MLP, sliding window on three of four layers, the others without RoPE",
        {"num_key_value_heads": 8},
        tiny=WINDOWS | {"logit_scale": 0.3},
    ),
    Family("smollm3", "SmolLM3", "layers without RoPE", tiny={}),
    Family(
        "deepseek_v3",
        "DeepSeek-V3, R1, Kimi K2, Moonlight",
        "latent attention (MLA), groups of experts, YaRN",
        {"rope_parameters": _yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0)},
        tiny=MLA,
    ),
    Family("minimax_m2", "MiniMax-M2", "norms over all heads, experts", tiny=EXPERTS),
    Family(
        "llama4_text",
        "Llama 4 (text)",
        "local blocks, layers without RoPE whose scores grow with the position, experts",
        {"interleave_moe_layer_step": 2},
        tiny=EXPERTS | {"attention_chunk_size": 8, "intermediate_size_mlp": 48},
    ),
    Family(
        "phimoe",
        "Phi-3.5-MoE",
        "sliding window, experts",
        {"sliding_window": 2047, "lm_head_bias": True, "attention_bias": True},
        tiny=EXPERTS | WINDOW,
    ),
    Family("gpt_neox", "Pythia, GPT-NeoX-20B", "parallel MLP, RoPE on a quarter of each head", tiny={}),
    Family("gpt2", "GPT-2", "learned positions, dropout", tiny=GPT_2),
    Family(
        "afmoe",
        "Trinity",
        "sliding window on three of four layers, experts, gated attention",
        tiny=EXPERTS | WINDOWS | {"num_experts": 8, "num_dense_layers": 1},
    ),
    Family("apertus", "Apertus", "xIELU, norms of q and k", {"num_key_value_heads": 8}),
    Family(
        "arcee", "AFM-4.5B", "squared ReLU", {"num_key_value_heads": 4, "num_attention_heads": 20, "hidden_size": 2560}
    ),
    Family("biogpt", "BioGPT", "learned positions", {"layerdrop": 0.0}),
    Family("codegen", "CodeGen", "parallel MLP; from transformers 5.24", oldest="5.24"),
    Family("cohere", "Command R, Aya", "parallel MLP, scaled logits", {"use_qk_norm": True}),
    Family("cwm", "Code World Model", "sliding window on three of four layers"),
    Family(
        "dbrx",
        "DBRX",
        "experts, clipped q, k and v",
        {
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 5e5},
            "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752},
        },
    ),
    Family(
        "deepseek_v2",
        "DeepSeek-V2, V2-Lite, Coder-V2",
        "latent attention (MLA), experts",
        {
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family(
        "dots1",
        "dots.llm1",
        "experts",
        {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    ),
    Family("ernie4_5", "ERNIE 4.5 0.3B", "interleaved RoPE"),
    Family(
        "ernie4_5_moe",
        "ERNIE 4.5 21B-A3B, 300B-A47B",
        "experts, interleaved RoPE",
        tiny=EXPERTS | {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    Family(
        "exaone4",
        "EXAONE 4",
        "sliding window on three of four layers, norms after attention and MLP",
        {"num_key_value_heads": 8},
    ),
    Family("exaone_moe", "K-EXAONE", "sliding window on three of four layers, experts"),
    Family("flex_olmo", "FlexOlmo", "experts, norms over all heads"),
    Family("glm", "GLM-4 9B", "RoPE on half of each head"),
    Family("glm4_moe_lite", "GLM-4.7-Flash", "latent attention (MLA), experts"),
    Family("gpt_bigcode", "StarCoder", "one key/value head, learned positions"),
    Family("gptj", "GPT-J", "parallel MLP, interleaved RoPE; from transformers 5.24", oldest="5.24"),
    Family("granitemoe", "Granite 3 MoE", "experts, multipliers"),
    Family(
        "granitemoeshared",
        "Granite MoE with shared experts",
        "experts and a shared one, multipliers",
        {"shared_intermediate_size": 1024},
    ),
    Family("helium", "Helium", "interleaved RoPE"),
    Family(
        "hunyuan_v1_dense",
        "Hunyuan (dense)",
        "norms of q and k after RoPE",
        {"head_dim": 128, "num_key_value_heads": 8},
    ),
    Family(
        "hunyuan_v1_moe",
        "Hunyuan-A13B",
        "experts and a shared one, norms of q and k after RoPE",
        {"head_dim": 128, "num_key_value_heads": 8, "num_experts": 64, "moe_topk": 8},
    ),
    Family("jais2", "Jais 2", "LayerNorm, squared ReLU", {"num_key_value_heads": 8}),
    Family("minicpm3", "MiniCPM3", "latent attention (MLA), multipliers"),
    Family(
        "ministral",
        "Ministral 8B",
        "sliding window on three of four layers",
        {"head_dim": 128, "num_key_value_heads": 8, "sliding_window": 32768},
    ),
    Family("ministral3", "Ministral 3", "scores that grow with the position, YaRN"),
    Family("modernbert-decoder", "Ettin decoders", "sliding window on two of three layers, two RoPEs"),
    Family("nanochat", "nanochat", "norms without weights, squared ReLU, softcap of logits"),
    Family("nemotron", "Nemotron-4, Minitron", "LayerNorm with 1 added, squared ReLU", {"num_key_value_heads": 8}),
    Family("olmo", "OLMo", "norms without weights, clipped q, k and v", {"clip_qkv": 0.7}),
    Family("olmoe", "OLMoE", "experts, norms over all heads"),
    Family(
        "opt",
        "OPT",
        "learned positions",
        {"layerdrop": 0.0},
        tiny={"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    Family("persimmon", "Persimmon", "norms of q and k, squared ReLU"),
    Family(
        "phi",
        "Phi-1 and 2",
        "parallel MLP, RoPE on a part of each head",
        {"partial_rotary_factor": 0.4, "hidden_size": 2560},
    ),
    Family("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", "experts and a shared one with a gate"),
    Family("seed_oss", "Seed-OSS-36B", "biases"),
    Family("solar_open", "Solar Open", "experts"),
    Family(
        "stablelm",
        "StableLM 2 and 3B",
        "LayerNorm, RoPE on a quarter of each head",
        {"num_key_value_heads": 8},
        tiny={},
    ),
    Family("starcoder2", "StarCoder2", "sliding window, biases", {"sliding_window": 4096}, tiny={}),
    Family("vaultgemma", "VaultGemma", "softcap of scores and logits, sliding window on half of the layers"),
    Family("youtu", "Youtu-LLM", "latent attention (MLA)"),
)


KINDS = ("dense", "sliding windows or local blocks", "experts", "latent attention (MLA)")
BEGIN, END = "<!-- models: written by `python -m tests.families` -->", "<!-- end of models -->"


def kind_of(family: Family) -> str:
    """Return the row of the README's table that a family belongs to."""
    settings = family.config.to_dict()
    if settings.get("kv_lora_rank"):
        return KINDS[3]
    if "experts" in family.special:
        return KINDS[2]
    return KINDS[1] if "window" in family.special else KINDS[0]


def table_of_kinds() -> str:
    """Return the models of each kind, in Markdown."""
    rows = {kind: ", ".join(f.models for f in FAMILIES if kind_of(f) == kind) for kind in KINDS}
    return "\n".join(["| kind | models |", "|---|---|", *(f"| {kind} | {models} |" for kind, models in rows.items())])


def table_of_families() -> str:
    """Return a row for each family, in Markdown."""
    rows = sorted(FAMILIES, key=lambda family: family.models.lower())
    lines = [f"| {family.models} | `{family.model_type}` | {family.special} |" for family in rows]
    return "\n".join(["| models | `model_type` | what is special |", "|---|---|---|", *lines])


TABLES = {"README.md": table_of_kinds, "docs/hugging_face.md": table_of_families}


def with_table(page: str, table: str) -> str:
    """Return a page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def write_tables() -> None:
    for name, table in TABLES.items():
        page = REPOSITORY / name
        page.write_text(with_table(page.read_text(encoding="utf-8"), table()), encoding="utf-8")


if __name__ == "__main__":
    write_tables()
