"""Checkpoints in the layouts of upstream's Megatron-DeepSpeed, written here by hand, become portable weights."""

import argparse
import enum
import re
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from megatron.weights.errors import WeightsError
from megatron.weights.megatron_deepspeed import MegatronDeepSpeedCheckpoint, is_megatron_deepspeed
from megatron.weights.safetensors_folder import SafetensorsFolder
from tests.reference.reference_model import random_state
from tests.unit.model.small_model import small_config, small_gpt_config
from tests.unit.tools.tool import run_tool

ROWS = 64
TOOL = "hf2megads_weight_converter"


class PositionEmbeddingType(enum.Enum):
    """A class of upstream's that a pickle names and that does not exist here."""

    rotary = 1


class Runs:
    """Creates a file if it is unpickled with code execution."""

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
    """Return the arguments that upstream saves, as its Namespace."""
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
    """Dotted names, as in a state_dict, with the embedding copy that a tied model has for its last stage."""
    result = {}
    for name, tensor in state.items():
        name = name.removeprefix("head.")
        inner = "encoder." if name.startswith(("layers.", "final_")) else ""
        result[f"language_model.{inner}{name}"] = tensor
    return result | {"word_embeddings_for_head.weight": torch.zeros(ROWS, 24)}


def part_of_rank(model, name, tensor, rank, num_ranks):
    """Slice a tensor to the part of one of upstream's tensor-parallel ranks, head by head and half by half."""

    def size(whole):
        return whole // num_ranks

    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        return tensor[rank * size(ROWS) : (rank + 1) * size(ROWS)]
    if ".query_key_value." in name:
        groups, per_group = model.num_key_value_heads, model.num_attention_heads // model.num_key_value_heads
        heads = tensor.view(groups, per_group + 2, model.kv_channels, *tensor.shape[1:])
        own = [heads[group].flatten(0, 1) for group in range(rank * size(groups), (rank + 1) * size(groups))]
        return torch.cat(own)
    if ".dense_h_to_4h." in name:
        width = model.ffn_hidden_size
        halves = [tensor[start : start + width] for start in range(0, tensor.shape[0], width)]  # gate, up
        return torch.cat([half[rank * size(width) : (rank + 1) * size(width)] for half in halves])
    if name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
        columns = size(tensor.shape[1])
        return tensor[:, rank * columns : (rank + 1) * columns]
    return tensor


def state_of_rank(model, state, rank, num_ranks):
    return {name: part_of_rank(model, name, tensor, rank, num_ranks).clone() for name, tensor in state.items()}


def write_partitions(folder, model, state, num_partitions, num_ranks=1, prefix="", sub_groups=2):
    """ZeRO-3: shapes in the models' files, flat fp32 weights in the optimizers', each parameter in padded parts."""
    folder.mkdir(parents=True)
    arguments = upstream_arguments(model, tensor_model_parallel_size=num_ranks, padded_vocab_size=ROWS)
    for rank in range(num_ranks):
        named = flat(state_of_rank(model, state, rank, num_ranks))
        named.pop("word_embeddings_for_head.weight")
        decayed = [name for name, tensor in named.items() if tensor.dim() > 1]
        cuts = [decayed[start::sub_groups] for start in range(sub_groups)] + [sorted(set(named) - set(decayed))]
        shapes = [OrderedDict((name, named[name].shape) for name in names) for names in cuts if names]
        for partition in range(num_partitions):
            end = f"zero_pp_rank_{partition}_mp_rank_{rank:02d}"
            empty = {name: torch.empty(0) for name in named}
            model_states = {"module": empty, "param_shapes": shapes, "buffer_names": [], "shared_params": {},
                            "ds_version": "0.14.4", "args": arguments, "checkpoint_version": 3.0}  # fmt: skip
            torch.save(model_states, folder / f"{end}_model_states.pt")
            groups = [
                torch.cat([padded_parts(named[name].float(), num_partitions)[partition] for name in group])
                for group in shapes
            ]
            optimizer = {"zero_stage": 3, "partition_count": num_partitions, "fp32_flat_groups": groups,
                         "loss_scaler": PositionEmbeddingType.rotary, "optimizer_state_dict": {}}  # fmt: skip
            torch.save({"optimizer_state_dict": optimizer}, folder / f"{prefix}{end}_optim_states.pt")


def padded_parts(tensor, count):
    """Cut a tensor's elements into `count` equal parts, the last one padded with values that must not be read."""
    missing = -tensor.numel() % count
    return torch.cat([tensor.flatten(), torch.full((missing,), 1e9)]).chunk(count)


def write_one_file(folder, model, state, layout=nested, arguments=None, **content):
    folder.mkdir(parents=True)
    content = {"args": arguments or upstream_arguments(model), "checkpoint_version": 3.0, "iteration": 7} | content
    torch.save({"module": layout(state), **content}, folder / "mp_rank_00_model_states.pt")


def write_model_files(folder, model, state, num_ranks, layout=nested):
    """Tensor parallelism without a pipeline: a file for each rank."""
    folder.mkdir(parents=True)
    arguments = upstream_arguments(model, tensor_model_parallel_size=num_ranks, padded_vocab_size=ROWS)
    for rank in range(num_ranks):
        content = {"module": layout(state_of_rank(model, state, rank, num_ranks)), "args": arguments}
        torch.save(content, folder / f"mp_rank_{rank:02d}_model_states.pt")


def write_layers(folder, model, state, first_block=2, rank=0, num_ranks=1):
    """A file for each layer of the pipeline: embedding, blocks, final norm, head if it is untied."""
    folder.mkdir(parents=True, exist_ok=True)
    state = state_of_rank(model, state, rank, num_ranks)
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
    arguments = upstream_arguments(model, tensor_model_parallel_size=num_ranks, pipeline_model_parallel_size=2)
    content = {"module": None, "args": arguments, "checkpoint_version": 3.0}
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


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("layout", [nested, flat, "layers"])
def test_the_ranks_of_tensor_parallelism_are_merged(tmp_path, model, layout, num_ranks):
    model = replace(model, num_attention_heads=4 * num_ranks, num_key_value_heads=2 * num_ranks, kv_channels=8)
    state = weights_of(model)
    if layout == "layers":
        for rank in range(num_ranks):
            write_layers(tmp_path / "step", model, state, rank=rank, num_ranks=num_ranks)
    else:
        write_model_files(tmp_path / "step", model, state, num_ranks, layout)
    assert_read(tmp_path / "step", model, state)


@pytest.mark.parametrize(
    "num_partitions, num_ranks, prefix, sub_groups", [(1, 1, "", 1), (3, 1, "bf16_", 2), (3, 2, "", 3)]
)
def test_the_partitions_of_zero_3_are_merged(tmp_path, model, num_partitions, num_ranks, prefix, sub_groups):
    model = replace(model, num_attention_heads=8, num_key_value_heads=4, kv_channels=8)
    state = weights_of(model)
    write_partitions(tmp_path / "step", model, state, num_partitions, num_ranks, prefix, sub_groups)
    assert is_megatron_deepspeed(tmp_path / "step")
    assert_read(tmp_path / "step", model, state)


def test_deepspeed_reads_the_same_out_of_these_files(tmp_path):
    """DeepSpeed's own script accepts the files written here as those of ZeRO-3."""
    model = MODELS["llama-grouped"]
    state = weights_of(model)
    write_partitions(tmp_path / "step", model, state, 3)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "step")
    expected = flat(state)
    assert set(theirs) == set(expected) - {"word_embeddings_for_head.weight"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.items())


def edit(file, change):
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def shorten(content):
    flat_groups = content["optimizer_state_dict"]["fp32_flat_groups"]
    flat_groups[-1] = flat_groups[-1][:-1]


@pytest.mark.parametrize(
    "missing, change, message",
    [
        ("mp_rank_01_model_states.pt", None, "mp_rank_01_model_states.pt is not there; copy the files of all ranks"),
        ("layer_03-model_01-model_states.pt", None, "layer 3 of the tensor-parallel ranks [0], and was written by 2"),
        ("zero_pp_rank_2_mp_rank_01_optim_states.pt", None, "written by 3 data-parallel ranks and has the optimizer"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", None, "zero_pp_rank_0_mp_rank_00_optim_states.pt is not there"),
        ("zero_pp_rank_0_mp_rank_01_model_states.pt", None, "zero_pp_rank_0_mp_rank_01_model_states.pt is not there"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", shorten, "holds other sizes than the shapes beside it say"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda c: c.clear(), "has no optimizer_state_dict"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda c: c["optimizer_state_dict"].pop("fp32_flat_groups"),
         "has no fp32_flat_groups"),
        ("mp_rank_00_model_states.pt", lambda c: vars(c["args"]).update(tensor_model_parallel_size=1),
         "has 32 rows in its embedding, and its args say padded_vocab_size 64"),
        ("mp_rank_00_model_states.pt", lambda c: vars(c["args"]).update(tensor_model_parallel_size="2"),
         "tensor_model_parallel_size '2', which must be a whole number above 0"),
        ("mp_rank_00_model_states.pt", lambda c: vars(c["args"]).update(pipeline_model_parallel_size=2),
         "lacks its layer_NN-model_RR-model_states.pt"),
        ("mp_rank_01_model_states.pt", lambda c: c["module"]["language_model"].pop("output_layer"),
         "has head.output_layer.weight on one of the tensor-parallel ranks 0 and 1 alone"),
        ("mp_rank_01_model_states.pt",
         lambda c: c["module"]["language_model"]["output_layer"].update(weight=torch.zeros(31, 24)),
         "has head.output_layer.weight in [32, 24] on the tensor-parallel rank 0 and in [31, 24] on rank 1"),
        ("mp_rank_01_model_states.pt", lambda c: c["module"]["language_model"]["encoder"].update(
            {"final_layernorm.weight": torch.zeros(24)}),
         "head.final_layernorm.weight differs between the tensor-parallel ranks 0 and 1"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys, missing, change, message):
    model = MODELS["llama-grouped"]
    if missing.startswith("mp"):
        write_model_files(tmp_path / "step", model, weights_of(model), 2)
    elif missing.startswith("layer"):
        for rank in range(2):
            write_layers(tmp_path / "step", model, weights_of(model), rank=rank, num_ranks=2)
    else:
        write_partitions(tmp_path / "step", model, weights_of(model), 3, 2)
    if change is None:
        (tmp_path / "step" / missing).unlink()
    else:
        edit(tmp_path / "step" / missing, change)
    assert run_tool(TOOL, "to-megatron", tmp_path / "step", tmp_path / "ours") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("ours*"))


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
    words = ("to-megatron", tmp_path / "run", tmp_path / "padded", "--make-vocab-size-divisible-by", "128")
    assert run_tool(TOOL, *words) == 2
    assert "(128) must divide the 64 rows that the checkpoint has" in capsys.readouterr().err


def test_no_code_of_a_pickle_is_executed(tmp_path):
    model = MODELS["gpt"]
    arguments = upstream_arguments(model, trap=Runs(str(tmp_path / "ran")))
    write_one_file(tmp_path / "step", model, weights_of(model), arguments=arguments)
    assert_read(tmp_path / "step", model, weights_of(model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_rotary_position_embeddings": True, "rope_theta": -1}, "--rotary-position-embeddings-theta (-1) must be"),
        ({"layernorm_epsilon": -1.0}, "--layernorm-epsilon (-1) must be above 0"),
        ({"use_alibi_position_embeddings": True}, "use_alibi_position_embeddings True, and False is supported"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p True, and False is supported"),
        ({"num_experts": [8]}, "num_experts [8], and None is supported"),
        ({"squared_relu": True}, "squared_relu True"),
        ({"hidden_size": None}, "args without hidden_size"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(tmp_path, changes, message):
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
    write_layers(tmp_path / "split", model, state, rank=1, num_ranks=2)
    write_layers(tmp_path / "alone", model, state)
    (tmp_path / "alone" / "mp_rank_00_model_states.pt").unlink()
    write_one_file(tmp_path / "torn", model, state)
    file = tmp_path / "torn" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-500])
    messages = {
        "old": "checkpoint_version 0, and 2.0 and later are supported",
        "empty": "holds no weights of a GPT",
        "split": "has layer 1 of the tensor-parallel ranks [1], and was written by 2",
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
