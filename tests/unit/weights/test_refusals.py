"""What cannot be converted is refused before anything is written, by name, with the value and what is supported."""

import json
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
        ("llama", {"hidden_size": "wide"}, "hidden_size is 'wide', which must be a whole number"),
        ("llama", {"hidden_size": "wide", "head_dim": None}, "has a value of the wrong kind"),
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


@pytest.mark.parametrize("text", [None, "", "[1]", "{"])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    save("llama", tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").unlink()
    if text is not None:
        (tmp_path / "theirs" / "config.json").write_text(text)
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


def test_a_tensor_that_nothing_takes_is_refused(tmp_path):
    save("llama", tmp_path / "theirs")
    edit_weights(tmp_path / "theirs", lambda tensors: tensors | {"model.layers.2.norm.weight": torch.ones(3)})
    refused(tmp_path / "theirs", "1 tensors that nothing here takes, 'model.layers.2.norm.weight' first")


@pytest.mark.parametrize(
    "name, harmless",
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama-tied", "lm_head.weight"),
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt2", "lm_head.weight"),
        ("pythia", "gpt_neox.layers.1.attention.masked_bias"),
    ],
)
def test_tensors_of_older_files_that_are_computed_are_passed_over(tmp_path, name, harmless):
    save(name, tmp_path / "theirs")
    edit_weights(tmp_path / "theirs", lambda tensors: tensors | {harmless: torch.ones(3)})
    from_hugging_face(tmp_path / "theirs", tmp_path / "out", Settings())


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
    with pytest.raises(WeightsError, match=r"no model_type .*llama: --normalization is rmsnorm there and layer"):
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
