"""Keys of config.json that transformers reads in its own way: the model here equals the one it builds from them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.arguments import parse_args
from megatron.config import architecture_fields, validate
from megatron.model.builder import Execution
from megatron.weights.hugging_face import Settings, from_hugging_face, training_flags
from tests.unit.weights.small_families import CASES as UNCHANGED
from tests.unit.weights.small_families import VOCAB, load_here, our_logits, read_portable, save

LENGTH = 37
REQUIRED = ("--seq-length", "37", "--lr", "1e-4", "--train-iters", "1", "--data-path", "x", "--vocab-size", "61",
            "--tokenizer-type", "NullTokenizer")  # fmt: skip
TOLERANCE = 2e-6  # both in fp64; transformers computes the angles in fp32


def old_rope(theta=500.0, **scaling):
    return {"rope_parameters": ..., "rope_theta": theta, "rope_scaling": scaling or None}


def rope(**values):
    return {"rope_parameters": {"rope_theta": 500.0} | values}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
CASES = [
    *((name, {}) for name in UNCHANGED),
    *((name, {"partial_rotary_factor": 0.5}) for name in ("llama", "mistral", "qwen2", "qwen3")),
    ("llama", rope(rope_type="default", partial_rotary_factor=0.5)),
    ("llama", old_rope()),
    ("llama", {"rope_theta": 90.0, **rope(rope_type="default")}),
    ("llama", old_rope(rope_type="linear", factor=2.5)),
    ("llama", old_rope(type="linear", factor=2)),
    ("llama", old_rope(**YARN)),
    ("llama", old_rope(**LLAMA3)),
    ("llama", old_rope(type="dynamic", factor=3.0, original_max_position_embeddings=7)),
    (
        "llama",
        {**rope(rope_type="default"), "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 90.0},
    ),
    ("llama", {**rope(**YARN), "original_max_position_embeddings": 12}),
    ("llama", {**rope(**LLAMA3), "original_max_position_embeddings": 12}),
    ("llama", {**rope(rope_type="linear", factor=2.0), "original_max_position_embeddings": 12}),
    ("llama", rope(rope_type="yarn", factor=4.0)),
    ("llama", rope(**YARN, mscale=0.7)),
    ("llama", rope(**YARN, mscale_all_dim=0.7)),
    ("llama", rope(**YARN, mscale=0.7, mscale_all_dim=0.0)),
    ("llama", rope(**YARN, mscale=0.7, mscale_all_dim=0.4)),
    ("llama", rope(**YARN, mscale=0.7, mscale_all_dim=0.4, attention_factor=1.3)),
    ("llama", rope(**YARN, beta_fast=2.0, beta_slow=2.0)),
    ("llama", rope(**YARN, beta_fast=0, beta_slow=None)),
    ("llama", rope(**YARN, truncate=True)),
    ("llama-multi-head", {"num_key_value_heads": None, "head_dim": None}),
    ("llama", {"sliding_window": 8, "final_logit_softcapping": 3.0, "attention_multiplier": 2.0}),
    ("qwen2", {"sliding_window": 8, "max_window_layers": 0, "attention_bias": False}),
    ("mistral", {"attention_bias": True}),
    ("gpt2", {"n_head": ..., "num_attention_heads": 2}),
    ("gpt2", {"hidden_size": 32}),
    ("pythia", {"rope_parameters": ...}),
    ("pythia", {"rope_parameters": ..., "rotary_pct": 0.5, "rotary_emb_base": 50}),
    ("pythia", {"rope_parameters": ..., "rotary_pct": 0.5, "partial_rotary_factor": 1.0, "rope_theta": 3.0}),
    ("pythia", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("pythia", {**rope(partial_rotary_factor=0.5, **YARN), "rotary_emb_base": 77, "head_dim": 8}),
]


@pytest.mark.parametrize("name, changes", CASES)
def test_the_model_is_the_one_of_transformers_and_its_flags_are_taken(tmp_path, name, changes):
    save(name, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").double().eval()
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours", Settings())
    ours = load_here(tmp_path / "ours", Execution(), LENGTH).double()
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        want = theirs(tokens).logits
    assert float((our_logits(ours, tokens) - want).norm() / want.norm()) < TOLERANCE

    portable, _ = read_portable(tmp_path / "ours")
    config = parse_args([*training_flags(portable), *REQUIRED])
    validate(config, 1, "cpu")
    assert architecture_fields(config.model) == architecture_fields(portable.model)
