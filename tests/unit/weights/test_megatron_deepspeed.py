"""Checkpoints in the layouts of upstream's Megatron-DeepSpeed, written here by hand, become portable weights."""

import argparse
import enum
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron.weights.errors import WeightsError
from megatron.weights.megatron_deepspeed import MegatronDeepSpeedCheckpoint, is_megatron_deepspeed
from megatron.weights.safetensors_folder import SafetensorsFolder
from tests.reference.reference_model import random_state
from tests.unit.model.small_model import small_config, small_gpt_config
from tests.unit.tools.tool import run_tool

ROWS = 64
TOOL = "hf2megads_weight_converter"


class PositionEmbeddingType(enum.Enum):
    """A class of upstream's that a pickle names and nobody here has."""

    rotary = 1


class Runs:
    """Creates a file when it is unpickled by whoever runs what a pickle says."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


MODELS = {
    "gpt": replace(small_gpt_config(), openai_gelu=True),
    "gpt-exact-gelu-untied": replace(small_gpt_config(), untie_embeddings_and_output_weights=True),
    "llama-grouped": small_config(),
    "llama-tied": replace(small_config(), untie_embeddings_and_output_weights=False, rotary_percent=0.5),
}


def upstream_arguments(model, **changes):
    """The command line that upstream saves, as its Namespace."""
    names = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "kv_channels",
        "max_position_embeddings", "layernorm_epsilon", "use_rotary_position_embeddings", "rotary_percent", "swiglu",
        "untie_embeddings_and_output_weights", "normalization",
    )  # fmt: skip
    values = {name: getattr(model, name) for name in names} | {
        "rope_theta": model.rotary_position_embeddings_theta,
        "add_bias_linear": not model.disable_bias_linear,
        "bias_gelu_fusion": model.openai_gelu,
        "tensor_model_parallel_size": 1,
        "num_experts": [1],
        "params_dtype": torch.bfloat16,
        "position_embedding_type": PositionEmbeddingType.rotary,
    }
    return argparse.Namespace(**(values | changes))


def nested(state):
    """{"a": {"b.c": tensor}} as upstream saves a model without a pipeline."""
    tree = {"embedding": {}, "encoder": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "embedding":
            module, _, leaf = rest.partition(".")
            tree["embedding"].setdefault(module, {})[leaf] = tensor
        elif name.startswith("head.output_layer"):
            tree["output_layer"] = {"weight": tensor}
        else:
            tree["encoder"][name.removeprefix("head.")] = tensor
    return {"language_model": tree}


def flat(state):
    """Dotted names, as a state_dict has them, with the copy that a tied model keeps for its last stage."""
    result = {}
    for name, tensor in state.items():
        name = name.removeprefix("head.")
        inner = "encoder." if name.startswith(("layers.", "final_")) else ""
        result[f"language_model.{inner}{name}"] = tensor
    return result | {"word_embeddings_for_head.weight": torch.zeros(ROWS, 24)}


def write_one_file(folder, model, state, layout=nested, arguments=None, **content):
    folder.mkdir(parents=True)
    content = {"args": arguments or upstream_arguments(model), "checkpoint_version": 3.0, "iteration": 7} | content
    torch.save({"module": layout(state), **content}, folder / "mp_rank_00_model_states.pt")


def write_layers(folder, model, state, first_block=2, rank=0):
    """A file for each layer of the pipeline: embedding, blocks, final norm, head if it is untied."""
    folder.mkdir(parents=True)
    groups = {1: {n.removeprefix("embedding."): t for n, t in state.items() if n.startswith("embedding.")}}
    for number in range(model.num_layers):
        start = f"layers.{number}."
        groups[first_block + number] = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
    last = first_block + model.num_layers
    norm = "head.final_layernorm."
    groups[last + 1] = {n.removeprefix(norm): t for n, t in state.items() if n.startswith(norm)}
    if model.untie_embeddings_and_output_weights:
        groups[last + 2] = {"lm_head.weight": state["head.output_layer.weight"]}
    for number, tensors in groups.items():
        torch.save(tensors, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    content = {"module": None, "args": upstream_arguments(model), "checkpoint_version": 3.0}
    torch.save(content, folder / "mp_rank_00_model_states.pt")


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def weights_of(model):
    state = random_state(model, ROWS, seed=4)
    if not model.untie_embeddings_and_output_weights:
        state.pop("head.output_layer.weight", None)
    return {name: tensor.float() for name, tensor in state.items()}


def assert_read(folder, model, state):
    checkpoint = MegatronDeepSpeedCheckpoint(folder)
    assert set(checkpoint.names) == set(state)
    for name, tensor in state.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.get(name), tensor), name
    portable = checkpoint.config()
    assert (portable.vocab_size, portable.padded_vocab_size) == (ROWS, ROWS)
    assert replace(portable.model, seq_length=0) == replace(model, seq_length=0)


@pytest.mark.parametrize("layout", [nested, flat])
def test_a_model_in_one_file(tmp_path, model, layout):
    state = weights_of(model)
    write_one_file(tmp_path / "global_step7", model, state, layout)
    assert_read(tmp_path / "global_step7", model, state)


@pytest.mark.parametrize("first_block", [2, 3])
def test_a_pipeline_of_more_than_nine_layers(tmp_path, model, first_block):
    model = replace(model, num_layers=11)
    state = weights_of(model)
    write_layers(tmp_path / "global_step7", model, state, first_block)
    assert_read(tmp_path / "global_step7", model, state)


def test_the_tool_takes_the_folder_of_latest(tmp_path, capsys):
    state = weights_of(MODELS["llama-grouped"])
    write_layers(tmp_path / "run" / "global_step7", MODELS["llama-grouped"], state)
    (tmp_path / "run" / "latest").write_text("global_step7\n")
    assert is_megatron_deepspeed(tmp_path / "run")
    assert run_tool(TOOL, "to-megatron", tmp_path / "run", tmp_path / "ours", "--dtype", "bfloat16") == 0
    assert "--use-rotary-position-embeddings" in capsys.readouterr().out.splitlines()[-1]
    ours = SafetensorsFolder(tmp_path / "ours")
    assert all(torch.equal(ours.get(name), tensor.bfloat16()) for name, tensor in state.items())
    assert run_tool(TOOL, "to-hf", tmp_path / "ours", tmp_path / "hf") == 0


def test_nothing_that_a_pickle_says_is_run(tmp_path):
    model = MODELS["gpt"]
    arguments = upstream_arguments(model, trap=Runs(str(tmp_path / "ran")))
    write_one_file(tmp_path / "step", model, weights_of(model), arguments=arguments)
    assert_read(tmp_path / "step", model, weights_of(model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size 2, and 1 is supported"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p True, and False is supported"),
        ({"num_experts": [8]}, "num_experts [8], and None is supported"),
        ({"squared_relu": True}, "squared_relu True"),
        ({"hidden_size": None}, "args without hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, message):
    model = MODELS["gpt"]
    write_one_file(tmp_path / "step", model, weights_of(model), arguments=upstream_arguments(model, **changes))
    with pytest.raises(WeightsError, match=re.escape(message)):
        MegatronDeepSpeedCheckpoint(tmp_path / "step").config()


def test_other_layouts_are_refused(tmp_path):
    model = MODELS["gpt"]
    state = weights_of(model)
    write_one_file(tmp_path / "old", model, state, checkpoint_version=0)
    write_one_file(tmp_path / "ours", model, state, arguments=SimpleNamespace().__dict__)
    write_one_file(tmp_path / "empty", model, {})
    write_layers(tmp_path / "split", model, state, rank=1)
    write_layers(tmp_path / "alone", model, state)
    (tmp_path / "alone" / "mp_rank_00_model_states.pt").unlink()
    write_one_file(tmp_path / "torn", model, state)
    file = tmp_path / "torn" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-500])
    messages = {
        "old": "checkpoint_version 0, and 2.0 and later are supported",
        "empty": "holds no weights of a GPT",
        "split": "split by tensor parallelism, and tensor-parallel size 1 is supported",
        "alone": "has no mp_rank_00_model_states.pt, which holds the architecture",
        "torn": "cannot be read",
    }
    for name, message in messages.items():
        with pytest.raises(WeightsError, match=re.escape(message)) as error:
            MegatronDeepSpeedCheckpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save({"module": state}, tmp_path / "ours" / "mp_rank_00_model_states.pt")
    with pytest.raises(WeightsError, match=r"has no args of Megatron-DeepSpeed.*tools/consolidate_checkpoint.py"):
        MegatronDeepSpeedCheckpoint(tmp_path / "ours")


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path, capsys):
    model = MODELS["gpt"]
    write_layers(tmp_path / "step", model, weights_of(model))
    (tmp_path / "step" / "layer_03-model_00-model_states.pt").unlink()
    assert run_tool(TOOL, "to-megatron", tmp_path / "step", tmp_path / "ours") == 2
    assert "no tensor 'layers.1." in capsys.readouterr().err
    assert not list(tmp_path.glob("ours*"))
