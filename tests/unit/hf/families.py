"""Tiny transformers models of many families, all weights random, none zero or one; their results in fp64."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB, LENGTH, BATCH = 61, 23, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA2 = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12}
LLAMA4 = {"attention_chunk_size": 8, "intermediate_size_mlp": 48}
# name: (transformers' model type, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mixtral": ("mixtral", EXPERTS),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", MLA | {"head_dim": 8, "num_key_value_heads": 2}),
    "granite": ("granite", SCALES),
    "deepseek_v3": ("deepseek_v3", MLA),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "minimax_m2": ("minimax_m2", EXPERTS),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", GPT2 | {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phimoe": ("phimoe", EXPERTS | {"sliding_window": 7}),
    "gemma2": ("gemma2", SLIDING | GEMMA2),
    "gemma3": ("gemma3_text", SLIDING | {"query_pre_attn_scalar": 12}),
    "olmo3": ("olmo3", SLIDING),
    "cohere2": ("cohere2", SLIDING | {"logit_scale": 0.3}),
    "gpt_oss": ("gpt_oss", EXPERTS | SLIDING),
    "llama4": ("llama4_text", EXPERTS | LLAMA4),
    "afmoe": ("afmoe", EXPERTS | SLIDING | {"num_experts": 8, "num_dense_layers": 1}),
    "ernie4_5_moe": ("ernie4_5_moe", EXPERTS | {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
}


def config_of(family: str, **changes: Any) -> Any:
    """The configuration of a family's tiny model."""
    kind, differences = FAMILIES[family]
    config = CONFIG_MAPPING[kind](**{**SIZES, **differences, **changes})
    config._experts_implementation = "eager"
    return config


def build(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model with random weights, the same for every call."""
    torch.manual_seed(0)
    config = config_of(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(1.2 * values * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(0.1 * values + (1.0 if "norm" in name and "bias" not in name else 0.0))
    return model.to(dtype)


def inputs(length: int = LENGTH, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, mask and positions, [B, S] each; a third of the tokens masked."""
    generator = torch.Generator().manual_seed(11)
    tokens, labels = torch.randint(3, VOCAB, (2, batch, length), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) < 0.7).double()
    return tokens, labels, mask, torch.arange(length).expand(batch, length)


def eager_loss(model: Any, tokens: Tensor, labels: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """The sum of the masked token losses as transformers computes it, everything whole."""
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()


def results(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter by its name."""
    model.zero_grad()
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error, and where it is. A gradient that is zero but for rounding counts as none."""
    assert got.keys() == want.keys()
    floor = 1e-4 * max(float(w.norm()) for w in want.values())
    errors = {name: float((got[name] - w).norm() / w.norm().clamp_min(floor)) for name, w in want.items()}
    name = max(errors, key=lambda each: errors[each])
    return errors[name], name
