"""Unsupported models are refused before anything is written, by name, with the value and the supported values."""

import json
import math
import re

import pytest
import torch

from megatron.arguments import parse_args
from megatron.checkpointing import check_checkpoint
from megatron.weights.errors import WeightsError
from megatron.weights.hugging_face import Settings, choose_family, from_hugging_face, to_hugging_face, training_flags
from megatron.weights.portable import check_portable
from megatron.weights.portable_config import PortableConfig, model_of
from megatron.weights.safetensors_folder import SafetensorsFolder, SafetensorsWriter
from tests.unit.weights.small_families import read_portable, save


def refused(folder, message, **options):
    """Converting `folder` fails with a message of one line, and leaves nothing."""
    out = folder.parent / "out"
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        from_hugging_face(folder, out, Settings(), **options)
    assert "\n" not in str(error.value)
    assert not list(folder.parent.glob("out*"))


def edit_config(folder, **changes):
    """Change keys of config.json; a value of ... removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(folder, change):
    """Replace the weights by `change` of them, a function from {name: tensor}."""
    weights = SafetensorsFolder(folder)
    tensors = {name: weights.get(name) for name in weights.names}
    config = (folder / "config.json").read_text()
    for file in folder.iterdir():
        file.unlink()
    with SafetensorsWriter(folder) as writer:
        (writer.staging / "config.json").write_text(config)
        for name, tensor in change(tensors).items():
            writer.add(name, tensor)


def _scaling(**values):
    """Changes of config.json to a scaling; a value of ... leaves a key out."""
    return {"rope_parameters": {"rope_theta": 500.0} | {key: v for key, v in values.items() if v is not ...}}


def _yarn(**changes):
    return _scaling(**{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24} | changes)


def _llama3(**changes):
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
    return _scaling(rope_type="llama3", **values | changes)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"model_type": "mixtral"}, "model_type 'mixtral', and llama, mistral, qwen2, qwen3, gpt2, gpt_neox"),
        ("llama", {"model_type": ...}, "model_type None"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', and 'silu' is supported"),
        ("llama", {"attention_bias": True}, "attention_bias True, and False is supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias True, and False is supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config, and unquantized weights are supported"),
        ("llama", {"hidden_size": ...}, "has no hidden_size, which its model_type needs"),
        ("llama", {"vocab_size": "61"}, "vocab_size '61', which must be a whole number above 0"),
        ("llama", {"vocab_size": None}, "has no vocab_size"),
        ("llama", {"hidden_size": "wide"}, "hidden_size 'wide', which must be a whole number above 0"),
        ("llama", {"num_hidden_layers": 2.0}, "num_hidden_layers 2.0, which must be a whole number above 0"),
        ("llama", {"num_hidden_layers": 10**6}, "--num-layers (1000000) must be at most 65536"),
        ("llama", {"hidden_size": 10**4000}, f"hidden_size 1{'0' * 59}..., which must be a whole number"),
        (
            "llama",
            {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
            "--hidden-size (2147483647) must be at most",
        ),
        ("llama", {"head_dim": 0}, "head_dim 0, which must be a whole number above 0"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads 0, which must be a whole number above 0"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads True, which must be a whole number"),
        ("llama", {"max_position_embeddings": -1}, "max_position_embeddings -1, which must be a whole number"),
        *(
            ("llama", {"rms_norm_eps": value}, f"rms_norm_eps {value!r}, which must be a number above 0")
            for value in (math.nan, math.inf, -1, 0.0, "x", None, [1])
        ),
        ("gpt2", {"layer_norm_epsilon": math.nan}, "layer_norm_epsilon nan, which must be a number above 0"),
        ("pythia", {"layer_norm_eps": "1e-5"}, "layer_norm_eps '1e-5', which must be a number above 0"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false', which must be true or false"),
        ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings None, which must be true or false"),
        ("pythia", {"use_parallel_residual": "false"}, "use_parallel_residual 'false', which must be true or false"),
        *(
            ("llama", {"rope_parameters": None, "rope_theta": value}, f"rope_theta {value!r}, which must be a number")
            for value in (math.nan, math.inf, -1, 1, "1e4", None)
        ),
        ("llama", {"rope_theta": -1}, "rope_theta -1, which must be a number above 1"),
        ("llama", {"rope_parameters": {"rope_theta": math.nan}}, "rope_theta nan, which must be a number above 1"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters [1], which must be an object or null"),
        ("llama", {"rope_parameters": {"rope_type": ["x"]}}, "rope_type ['x']"),
        ("llama", _yarn(factor="4"), "factor '4', which must be a number at least 1"),
        ("llama", _yarn(factor=math.nan), "factor nan, which must be a number at least 1"),
        ("llama", _yarn(factor=...), "rope_type 'yarn' without a factor"),
        ("llama", _yarn(beta_fast=-2.0), "beta_fast -2.0, which must be a number above 0"),
        ("llama", _yarn(beta_fast=1.0, beta_slow=3.0), "beta_fast 1.0 and beta_slow 3.0, and beta_fast must be the"),
        ("llama", _yarn(attention_factor=0), "attention_factor 0, which must be a number above 0"),
        ("llama", _yarn(original_max_position_embeddings=2.5), "original_max_position_embeddings 2.5, which must be"),
        ("llama", _yarn(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 with rope_type 'yarn', and its model_"),
        ("llama", _yarn(truncate=False), "truncate False with rope_type 'yarn', which is not supported"),
        ("llama", _llama3(low_freq_factor=4.0), "high_freq_factor 4.0 and low_freq_factor 4.0, and high_freq_factor m"),
        ("llama", _llama3(low_freq_factor=...), "rope_type 'llama3' without a low_freq_factor"),
        ("llama", {"head_dim": 11}, "the width of a head (11) must be even"),
        ("pythia", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "dimensions is 3, which must be even"),
        ("pythia", {"rope_parameters": None, "rotary_pct": math.nan}, "rotary_pct nan, which must be a number above 0"),
        ("pythia", {"head_dim": 4}, "head_dim 4, and a head of hidden_size / num_attention_heads = 8 is supported"),
        ("llama", {"is_causal": False}, "is_causal False, and True is supported"),
        ("qwen3", {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, "per_layer_config {'0': {'rms_norm_eps': 0.5}}"),
        ("llama", {"layer_types": 3}, "layer_types 3, and a list or null is supported"),
        ("llama", {"model_type": ["llama"]}, "model_type ['llama'], and llama, mistral"),
        ("mistral", {"sliding_window": math.nan}, "sliding_window nan, which must be a whole number"),
        ("gpt2", {"num_attention_heads": 2}, "n_head 4 and num_attention_heads 2, two names of one setting"),
        ("gpt2", {"n_inner": 0}, "n_inner 0, which must be a whole number above 0"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3, which must divide num_attention_heads 4"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type 'su'"),
        ("mistral", {"sliding_window": 16}, "sliding_window 16 below max_position_embeddings 48"),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 9000}, "sliding_window 4096 below"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True, and False is supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu', and 'gelu_new' or 'gelu_pytorch_tanh'"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings False, and True is supported"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("pythia", {"attention_bias": False}, "attention_bias False, and True is supported"),
        ("pythia", {"hidden_act": "relu"}, "hidden_act 'relu', and 'gelu' or 'gelu_new'"),
    ],
)
def test_an_unsupported_config_is_refused_by_name_and_value(tmp_path, name, changes, message):
    save(name, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **changes)
    refused(tmp_path / "theirs", message)


DEEP = '{"a": ' * 100_000


@pytest.mark.parametrize("text", [None, "", "[1]", "{", '{"hidden_size": 32, "hidden_size": 32}', DEEP, "\udce9"])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    save("llama", tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").unlink()
    if text is not None:
        (tmp_path / "theirs" / "config.json").write_text(text, errors="surrogateescape")
    refused(tmp_path / "theirs", "config.json cannot be read")


def test_a_missing_tensor_is_refused(tmp_path):
    save("llama", tmp_path / "theirs")
    gone = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(tmp_path / "theirs", lambda tensors: {name: t for name, t in tensors.items() if name != gone})
    refused(tmp_path / "theirs", f"no tensor {gone!r}, which config.json asks for")


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    save("llama", tmp_path / "theirs")
    edit_config(tmp_path / "theirs", intermediate_size=48)
    refused(tmp_path / "theirs", "'model.layers.0.mlp.gate_proj.weight' is [44, 32], and config.json asks for [48, 32]")


def test_a_quantized_tensor_is_refused(tmp_path):
    save("llama", tmp_path / "theirs")
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(tmp_path / "theirs", lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    refused(tmp_path / "theirs", f"the tensor {name!r} holds int8, and floating-point weights are supported")


def test_a_tensor_that_nothing_takes_is_refused(tmp_path):
    save("llama", tmp_path / "theirs")
    edit_weights(tmp_path / "theirs", lambda tensors: tensors | {"model.layers.2.norm.weight": torch.ones(3)})
    refused(tmp_path / "theirs", "1 tensors that nothing here takes, 'model.layers.2.norm.weight' first")


@pytest.mark.parametrize(
    "name, harmless",
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.1.attn.bias"),
        ("pythia", "gpt_neox.layers.1.attention.masked_bias"),
    ],
)
def test_computed_tensors_of_older_files_are_skipped(tmp_path, name, harmless):
    save(name, tmp_path / "theirs")
    edit_weights(tmp_path / "theirs", lambda tensors: tensors | {harmless: torch.ones(3)})
    from_hugging_face(tmp_path / "theirs", tmp_path / "out", Settings())


@pytest.mark.parametrize(
    "name, embedding, head",
    [
        ("llama-tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("gpt-neox-tied", "gpt_neox.embed_in.weight", "embed_out.weight"),
    ],
)
def test_a_tied_head_may_be_in_the_file_if_it_equals_the_embedding(tmp_path, name, embedding, head):
    save(name, tmp_path / "theirs")
    edit_weights(tmp_path / "theirs", lambda tensors: tensors | {head: tensors[embedding].clone()})
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours", Settings())
    for other in (lambda t: t + torch.zeros_like(t).index_fill(0, torch.tensor(3), 0.1), lambda t: t[:-1]):
        edit_weights(tmp_path / "theirs", lambda tensors, other=other: tensors | {head: other(tensors[embedding])})
        refused(tmp_path / "theirs", f"tie_word_embeddings true, and {head!r} differs from {embedding!r}; set")


def test_names_without_the_outer_module_are_read(tmp_path):
    save("gpt2", tmp_path / "theirs")
    from_hugging_face(tmp_path / "theirs", tmp_path / "long", Settings())
    edit_weights(tmp_path / "theirs", lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
    from_hugging_face(tmp_path / "theirs", tmp_path / "short", Settings())
    long, short = SafetensorsFolder(tmp_path / "long"), SafetensorsFolder(tmp_path / "short")
    assert all(torch.equal(short.get(name), long.get(name)) for name in long.names)


@pytest.fixture
def ours(tmp_path):
    save("llama", tmp_path / "theirs")
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours", Settings())
    return tmp_path / "ours"


def test_an_architecture_that_no_family_has_is_refused_with_the_differences(ours, tmp_path):
    portable, weights = read_portable(ours)
    changed = PortableConfig(model_of({**vars(portable.model), "normalization": "layernorm"}), 61, 61)
    with pytest.raises(WeightsError, match=r"no supported .*llama: --normalization is rmsnorm there and layer"):
        to_hugging_face(weights, changed, tmp_path / "out", Settings())
    assert not list(tmp_path.glob("out*"))


def test_a_model_type_that_cannot_hold_the_model_is_refused(ours, tmp_path):
    portable, _ = read_portable(ours)
    with pytest.raises(WeightsError, match="qwen2: --add-qkv-bias is True there and False here"):
        choose_family(portable, "qwen2")
    assert choose_family(portable, "mistral").model_type == "mistral"


def test_a_vocabulary_beyond_the_rows_is_refused(ours, tmp_path):
    portable, weights = read_portable(ours)
    with pytest.raises(WeightsError, match=r"the vocabulary \(99\) must be at most the 61 rows"):
        to_hugging_face(weights, PortableConfig(portable.model, 99, 61), tmp_path / "out", Settings())


def test_weights_that_do_not_fit_their_config_are_refused(ours, tmp_path):
    portable, weights = read_portable(ours)
    deeper = model_of({**vars(portable.model), "num_layers": 3})
    with pytest.raises(WeightsError, match=r"no tensor 'layers.2.input_layernorm.weight'"):
        to_hugging_face(weights, PortableConfig(deeper, 61, 61), tmp_path / "out", Settings())
    shallower = model_of({**vars(portable.model), "num_layers": 1})
    with pytest.raises(WeightsError, match=r"6 tensors that nothing here takes, 'layers.1.input_layernorm.weight'"):
        to_hugging_face(weights, PortableConfig(shallower, 61, 61), tmp_path / "out", Settings())


def test_a_config_of_other_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(WeightsError, match="has no section 'model'"):
        PortableConfig.read(tmp_path, 61)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"hidden_size": 3}}))
    with pytest.raises(WeightsError, match="is incomplete"):
        PortableConfig.read(tmp_path, 61)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"shape": "round", "max_position_embeddings": 4}}))
    with pytest.raises(WeightsError, match="the architecture has shape, unknown here"):
        PortableConfig.read(tmp_path, 61)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"swiglu": "false"}, "swiglu is 'false', which must be true or false"),
        ({"layernorm_epsilon": math.nan}, "--layernorm-epsilon (nan) must be above 0"),
        ({"layernorm_epsilon": "x"}, "layernorm_epsilon is 'x', which must be a number"),
        ({"num_layers": 2.0}, "num_layers is 2.0, which must be a whole number"),
        ({"num_key_value_heads": 3}, "--num-key-value-heads (3) must divide --num-attention-heads (4)"),
        ({"normalization": "none"}, "normalization is 'none', which must be another value"),
    ],
)
def test_a_damaged_architecture_is_refused(ours, changes, message):
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"model": config["model"] | changes}))
    with pytest.raises(WeightsError, match=re.escape(message)):
        read_portable(ours)


@pytest.mark.parametrize("changes", [{"vocab_size": "61"}, {"vocab_size": -1}, {"hugging_face": [1]}])
def test_a_damaged_vocabulary_or_origin_is_refused(ours, changes):
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(WeightsError, match="which must be"):
        read_portable(ours)


def test_another_rope_is_refused_unless_it_is_asked_for(ours):
    longer = model_of({**vars(read_portable(ours)[0].model), "rotary_position_embeddings_theta": 1e7})
    with pytest.raises(WeightsError, match=r"theta is 500000.0 in the checkpoint and 10000000.0.*add --change-rope to"):
        check_portable(ours, longer, 61)
    check_portable(ours, longer, 61, change_rope=True)
    other = model_of({**vars(longer), "swiglu": False})
    with pytest.raises(WeightsError, match="--swiglu is True in the checkpoint and False in the flags; pass the flags"):
        check_portable(ours, other, 61, change_rope=True)


def test_the_flag_reaches_portable_weights(ours):
    portable, _ = read_portable(ours)
    flags = [*training_flags(portable), "--rotary-position-embeddings-theta", "1e7", "--load", str(ours)]
    flags += ["--seq-length", "48", "--lr", "1e-4", "--train-iters", "1", "--data-path", "x", "--vocab-size", "60"]
    with pytest.raises(WeightsError, match="add --change-rope"):
        check_checkpoint(ours, parse_args(flags), 1, 61)
    check_checkpoint(ours, parse_args([*flags, "--change-rope"]), 1, 61)
