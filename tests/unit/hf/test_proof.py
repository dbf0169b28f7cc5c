"""A Hugging Face model trains here as in transformers, or is refused before it starts."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING

from megatron.config.errors import ConfigError
from megatron.hf import proof
from megatron.hf.float64 import float64_stays
from megatron.hf.proof import NUM_TOKENS, Outcome, check, compare, prove, random_model, random_sample, whole
from megatron.hf.shrinking import shrink
from tests.families import FAMILIES

BY_NAME = {family.model_type: family for family in FAMILIES}

# (family, setting, another value): what a stream would compute that overlooks or alters the setting
SETTINGS = [
    ("mistral", "sliding_window", 8),
    ("mistral", "sliding_window", None),
    ("gpt_oss", "layer_types", ["full_attention"] * 4),
    ("gpt_oss", "rope_parameters", {"rope_type": "default", "rope_theta": 150000.0}),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "final_logit_softcapping", None),
    ("gemma2", "query_pre_attn_scalar", 255),
    ("gemma3_text", "layer_types", ["full_attention"] * 4),
    ("granite", "attention_multiplier", 0.0079),
    ("granite", "embedding_multiplier", 11.0),
    ("granite", "residual_multiplier", 0.23),
    ("granite", "logits_scaling", 15.0),
    ("cohere2", "logit_scale", 0.07),
    ("smollm3", "no_rope_layers", [1, 1, 1, 1]),
    ("deepseek_v3", "routed_scaling_factor", 2.4),
    ("deepseek_v3", "topk_group", 3),
    ("llama4_text", "attention_chunk_size", 9),
    ("llama4_text", "attn_temperature_tuning", False),
    ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
    ("olmo", "clip_qkv", None),
]


def small_of(name):
    small = shrink(BY_NAME[name].config)
    small._experts_implementation = "eager"
    return small


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_trains_as_in_transformers(family):
    if not family.is_streamed:
        pytest.skip(f"needs transformers {family.oldest}")
    found = prove(family.config)
    assert found.loss < 1e-14
    has_key_biases = family.model_type in ("biogpt", "opt")  # whose gradients are nothing but rounding
    assert found.gradient < (1e-9 if has_key_biases else 1e-12)
    words = f"a small copy of {family.model_type} against transformers in "
    assert re.fullmatch(words + r"[\d.]+ s: loss equal to \S+, gradients to \S+", found.line)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_balanced_experts_train_as_in_transformers(name):
    balanced = BY_NAME[name].config
    balanced.output_router_logits, balanced.router_aux_loss_coef = True, 0.5
    assert prove(balanced).gradient < 1e-12


REFUSED = [
    ("bert", "its tokens attend to later ones"),
    ("longcat_flash", "LongcatFlashForCausalLM has no list of its 56 layers"),
    ("deepseek_v32", "a small copy of it does not run .TypeError: .* in modeling_deepseek_v32.py:"),
]


@pytest.mark.parametrize("name, message", REFUSED)
def test_a_model_that_cannot_be_streamed_is_refused(name, message):
    with pytest.raises(ConfigError, match=rf"Hugging Face model \({name}\) cannot be streamed: .*{message}.*; train"):
        prove(CONFIG_MAPPING[name]())


def test_the_random_numbers_of_a_run_stay():
    before = torch.get_rng_state()
    prove(BY_NAME["llama"].config)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_without_a_finite_loss_cannot_be_compared(monkeypatch):
    monkeypatch.setattr(proof, "whole", lambda model, sample: Outcome(torch.tensor(torch.nan), {}))
    with pytest.raises(ConfigError, match="a small copy of it gives a loss of nan, and cannot be compared; train"):
        prove(BY_NAME["llama"].config)


@pytest.mark.parametrize("name, setting, value", SETTINGS)
def test_every_setting_matters_to_the_small_copy(name, setting, value):
    small = small_of(name)
    sample = random_sample(small, (NUM_TOKENS,))
    with float64_stays():
        wanted = whole(random_model(small), sample)
        setattr(small, setting, value)
        if setting == "layer_types" and name == "gpt_oss":
            small.sliding_window = NUM_TOKENS
        found = compare(name, wanted, whole(random_model(small), sample))
    assert found.gradient > 1e-6
    with pytest.raises(ConfigError, match=rf"\({name}\) trains otherwise here than in transformers.* report"):
        check(found, (NUM_TOKENS,))


def test_an_error_of_one_gradient_is_found():
    small = small_of("gpt_oss")
    sample = random_sample(small, (23, 20, 18))
    with float64_stays():
        wanted, got = (whole(random_model(small), sample) for _ in range(2))
    assert compare("gpt_oss", wanted, got).gradient == 0.0
    sinks = "model.layers.1.self_attn.sinks"
    for wrong in (got.gradients[sinks] * (1 + 1e-8), None, got.gradients[sinks] * torch.nan):
        found = compare("gpt_oss", wanted, replace(got, gradients={**got.gradients, sinks: wrong}))
        with pytest.raises(ConfigError, match=f"for a small copy and 3 documents .* the gradient of {sinks} by"):
            check(found, (23, 20, 18))


def test_casts_to_single_precision_are_lifted():
    x = torch.full((3,), 1 / 3, dtype=torch.float64)
    with float64_stays():
        for cast in (x.float(), x.to(torch.float32), x.type(torch.float32), x.to(device="cpu", dtype=torch.float32)):
            assert torch.equal(cast, x)
        assert torch.nn.functional.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        assert x.sum(dtype=torch.float32).dtype == torch.float64
        assert x.bfloat16().dtype == torch.float64
        assert torch.ones(3).bfloat16().dtype == torch.bfloat16
    assert x.float().dtype == torch.float32
