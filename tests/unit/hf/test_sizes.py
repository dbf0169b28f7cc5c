"""The sizes that a run on the meta device shows, beside those of flags and of modules."""

from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron.config import ModelConfig, Recompute, TokenWeights
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.device_budget import NO_DEVICE_MEMORY
from megatron.fpdt.stream import Saving
from megatron.hf.settings import read_model
from megatron.hf.sizes import describe
from megatron.planner.flops import flops_of_recomputed_attention, flops_of_streaming, forward_flops
from megatron.planner.hardware import GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.plan import Plan
from megatron.weights.hugging_face import read_hugging_face_config
from tests.unit.hf.folders import BY_TYPE, TINY, folder_of

LENGTH = 2**20
FLAGS = ModelConfig(num_layers=0, hidden_size=0, num_attention_heads=0, seq_length=LENGTH)
LATENT = {
    **TINY, "head_dim": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip


def machines(gpus=8):
    return Machines(GPUS["H100"], gpus, 8, 1900.0)


def plan(model, rows):
    return Plan(Job(model, rows, 8, 2**18, 8), machines(), "flash-attn-4")


# Families that flags describe as well.
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {}),
        ("gpt2", {"n_positions": LENGTH}),
        ("gpt_neox", {"head_dim": 16}),
    ],
)
def test_a_dense_model_is_planned_as_its_flags_are(tmp_path, model_type, changes):
    folder = folder_of(tmp_path, model_type, **changes)
    portable = read_hugging_face_config(folder)
    by_flags = replace(portable.model, seq_length=LENGTH)
    by_folder = read_model(folder, FLAGS)
    assert replace(by_folder.sizes, softcap=None) == by_flags.sizes
    theirs, ours = (plan(model, portable.vocab_size) for model in (by_folder, by_flags))
    assert theirs.job.shape == ours.job.shape
    assert theirs.job.num_parameters == ours.job.num_parameters
    assert theirs.memory == ours.memory
    assert theirs.speed == ours.speed


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}),
        ("mixtral", {"num_local_experts": 4}),
        ("gpt_oss", BY_TYPE["gpt_oss"]),
        ("deepseek_v3", LATENT),
        ("gemma2", {}),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 64, "num_attention_heads": 4}),
        ("phimoe", {"num_local_experts": 4}),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    ],
)
def test_every_parameter_of_a_model_is_counted(tmp_path, model_type, changes):
    folder = folder_of(tmp_path, model_type, **changes)
    model = read_model(folder, FLAGS)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_pretrained(folder))
    matrices = sum(parameter.numel() for parameter in theirs.parameters() if parameter.ndim > 1)
    assert plan(model, model.embedding_rows).job.num_parameters == matrices
    assert model.sizes.token_weights.total <= model.sizes.all_block_weights
    assert model.sizes.block_weights * model.num_layers >= model.sizes.all_block_weights
    assert plan(model, model.embedding_rows).memory.gpu > 0


def test_experts_of_a_token_count_as_flops_and_all_of_them_as_memory():
    config = CONFIG_MAPPING["qwen3_moe"](
        **TINY | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    )
    sizes, layers, hidden = describe(config).sizes, 2, 64
    one_expert = 3 * hidden * 20
    before, output, router = hidden * (128 + 2 * 64), hidden * 128, hidden * 8
    assert sizes.token_weights == TokenWeights(
        before=layers * before, output=layers * output, mlp=0, last=0, unsaved=layers * (router + 2 * one_expert)
    )
    assert sizes.block_weights == before + output + router + 8 * one_expert
    assert sizes.largest_stack == 8 * 2 * hidden * 20
    assert sizes.saved_mlp_outputs == 0
    assert sizes.mlp_outputs == 2 * (2 * 20 + 2 * hidden)  # gate, up, the token's copy and the expert's result
    assert sizes.mlp_width == 2 * 20


def test_products_of_latent_attention_and_layers_of_two_kinds_are_added_up():
    described = describe(CONFIG_MAPPING["deepseek_v3"](**LATENT))
    sizes, first = described.sizes, described.layers[0]
    assert (first.num_heads, first.num_key_value_heads, first.head_size, first.narrow_head_size) == (4, 4, 24, 12)
    assert sizes.projection_width == 24 + 4 * 24 + (16 + 8) + 4 * (16 + 12)
    assert sizes.normalizes_products
    hidden, expert, dense = 64, 3 * 64 * 20, 3 * 64 * 96
    attention = hidden * 24 + 24 * 4 * 24 + hidden * (16 + 8) + 16 * 4 * (16 + 12) + 4 * 12 * hidden
    experts = hidden * 8 + (8 + 1) * expert
    assert sizes.block_weights == attention + max(dense, experts)
    assert sizes.all_block_weights == 2 * attention + dense + experts
    assert sizes.token_weights.total == 2 * attention + dense + hidden * 8 + (2 + 1) * expert


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_windows_and_blocks_leave_their_share_of_attention(model_type):
    """Count the pairs of query and key of every layer."""
    changes = {"gpt_oss": {"sliding_window": 8}, "llama4_text": {"attention_chunk_size": 8}}[model_type]
    config = CONFIG_MAPPING[model_type](**{**BY_TYPE.get(model_type, TINY), "num_hidden_layers": 4, **changes})
    sizes, length = describe(config).sizes, 4096
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    whole = (key <= query).sum().item()
    limited = key > query - 8 if model_type == "gpt_oss" else key >= query // 8 * 8
    part = ((key <= query) & limited).sum().item()
    num_limited = sum(kind != "full_attention" for kind in config.layer_types)
    assert 0 < num_limited < 4
    share = (num_limited * part + (4 - num_limited) * whole) / (4 * whole)
    assert sizes.attention_share(length) == pytest.approx(share, rel=2e-3)
    assert sizes.attention_share(8) == 1.0
    assert sizes.attention_share(length, documents=0.5) == pytest.approx(share - 0.5 * (4 - num_limited) / 4, rel=2e-3)


def test_flops_of_a_window_and_of_narrow_values(tmp_path):
    full = read_model(folder_of(tmp_path / "full", "mistral", sliding_window=None), FLAGS)
    narrow = read_model(folder_of(tmp_path / "narrow", "mistral", sliding_window=LENGTH // 4), FLAGS)
    whole, part = (forward_flops(model, model.embedding_rows, LENGTH) for model in (full, narrow))
    assert part.attention == pytest.approx(whole.attention * (1 - 0.75**2))
    assert (part.token_wise, part.head) == (whole.token_wise, whole.head)
    latent = read_model(folder_of(tmp_path / "latent", "deepseek_v3", **LATENT), FLAGS)
    assert forward_flops(latent, 0, LENGTH).attention == 2 * LENGTH**2 * 4 * (24 + 12)


@pytest.mark.parametrize("recompute", Recompute)
def test_experts_are_recomputed_whatever_is_saved(tmp_path, recompute):
    model = read_model(folder_of(tmp_path, "mixtral", num_local_experts=4), FLAGS)
    layout, weights = SequenceLayout(LENGTH, LENGTH), model.sizes.token_weights
    recomputed = flops_of_streaming(model, layout, 1, Saving(recompute, 1, NO_DEVICE_MEMORY))
    least = 2 * LENGTH * weights.unsaved
    rest = 2 * LENGTH * (weights.before + weights.output)
    recomputed -= flops_of_recomputed_attention(model, LENGTH, 1, recompute).total
    assert least <= recomputed <= least + rest
    assert (recomputed < least + rest) == recompute.saves_products


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
        ("mixtral", {"output_router_logits": True}),
    ],
)
def test_what_reads_values_changes_no_size(model_type, changes):
    config = CONFIG_MAPPING[model_type](**TINY, **changes)
    before = config.to_dict()
    assert describe(config) == describe(CONFIG_MAPPING[model_type](**TINY))
    assert config.to_dict() == before


def test_a_layer_without_attention_is_named():
    with pytest.raises(ValueError, match=r"layer 0 \(MambaBlock\) does not call attention"):
        describe(CONFIG_MAPPING["mamba"](num_hidden_layers=1, hidden_size=32, state_size=4))
