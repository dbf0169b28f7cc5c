"""A small copy of a real model keeps every setting, and two layers of each kind."""

from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron.config.errors import ConfigError
from megatron.hf.inspection import decoder_layers
from megatron.hf.shrinking import MOST_PARAMETERS, kind_of, on_meta, shrink
from tests.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_small_copy_of_every_family_runs(family):
    small = shrink(family.config)
    model = AutoModelForCausalLM.from_config(small, attn_implementation="eager")
    assert type(small) is type(family.config)
    assert sum(parameter.numel() for parameter in model.parameters()) < MOST_PARAMETERS / 4
    counts, whole = (
        sorted(Counter(map(kind_of, decoder_layers(each))).values()) for each in (model, on_meta(family.config))
    )
    assert len(counts) == len(whole), "every kind of layer is there"
    assert counts[0] == min(2, whole[0])
    assert model(input_ids=torch.arange(20)[None], use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}),
        ("mistral", {"num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 7}),
        ("gpt_oss", {"num_attention_heads": 16, "num_key_value_heads": 2, "num_experts_per_tok": 4}),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}),
        ("deepseek_v3", {"qk_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 8, "topk_group": 4}),
        ("deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 3, "n_routed_experts": 24}),
        ("llama4_text", {"attention_chunk_size": 8, "floor_scale": 16, "num_local_experts": 2}),
        ("gpt_neox", {"num_attention_heads": 4, "hidden_size": 64}),
    ],
)
def test_counts_and_sizes_shrink_in_proportion(name, sizes):
    small = shrink(CONFIG_MAPPING[name]())
    assert {key: getattr(small, key) for key in sizes} == sizes


def test_settings_stay():
    family = next(family for family in FAMILIES if family.model_type == "granite")
    small, config = shrink(family.config), family.config
    for name in ("attention_multiplier", "residual_multiplier", "logits_scaling", "rms_norm_eps", "rope_parameters"):
        assert getattr(small, name) == getattr(config, name)
    assert config.hidden_size == 4096, "the configuration given is left alone"


def test_randomness_is_off():
    assert shrink(CONFIG_MAPPING["gpt2"]()).resid_pdrop == 0.0
    assert shrink(CONFIG_MAPPING["phimoe"]()).router_jitter_noise == 0.0


def test_learned_positions_shrink_to_what_the_check_reads():
    assert shrink(CONFIG_MAPPING["gpt2"](n_positions=2**20)).n_positions == 128
    assert shrink(CONFIG_MAPPING["llama"](max_position_embeddings=2**20)).max_position_embeddings == 2**20


def test_a_model_that_stays_large_is_refused():
    with pytest.raises(
        ConfigError, match=r"gemma3\) cannot be checked: a small copy of it still has [\d,]+ parameters, "
    ):
        shrink(CONFIG_MAPPING["gemma3"]())


def test_kinds_of_layers_are_told_apart_without_their_index():
    kinds = [kind_of(layer) for layer in decoder_layers(on_meta(shrink(CONFIG_MAPPING["gemma2"]())))]
    assert [kind == kinds[0] for kind in kinds] == [True, False, True, False]
