import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron.config import ModelConfig
from megatron.engine.state_loading import check_parameters
from megatron.weights.errors import WeightsError
from megatron.weights.model_opening import open_model
from megatron.weights.opening import is_portable, kind_of, newest_checkpoint, open_state
from megatron.weights.portable import check_portable, write_portable
from megatron.weights.safetensors_folder import SafetensorsFolder, SafetensorsWriter
from megatron.weights.source import WEIGHTS, WeightsAlone

EMBEDDING = "embedding.word_embeddings.weight"
MODEL = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=16).resolved()


def write(folder: Path, config: object = None, **tensors: torch.Tensor) -> Path:
    with SafetensorsWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        if config is not None:
            (writer.staging / "config.json").write_text(json.dumps(config))
    return folder


def source(folder: Path) -> WeightsAlone:
    return WeightsAlone(SafetensorsFolder(folder))


def test_floating_point_tensors_are_written_in_the_dtype_asked_for(tmp_path):
    weights, index = torch.randn(4, 3), torch.arange(5)
    first = write(tmp_path / "first", {"model": {}}, weights=weights, index=index)
    write_portable(source(first), [first / "config.json"], tmp_path / "second", torch.bfloat16)
    second = SafetensorsFolder(tmp_path / "second")
    assert torch.equal(second.get("weights"), weights.bfloat16())
    assert torch.equal(second.get("index"), index)
    assert (tmp_path / "second" / "config.json").read_text() == (first / "config.json").read_text()


def test_weights_of_this_model_pass(tmp_path):
    config = {"model": vars(MODEL)}
    check_portable(write(tmp_path / "w", config, **{EMBEDDING: torch.zeros(128, 8)}), MODEL, 128)


@pytest.mark.parametrize("config", [None, {"num_hidden_layers": 3}])
def test_a_config_of_another_program_or_none_says_nothing(tmp_path, config):
    check_portable(write(tmp_path / "w", config, **{EMBEDDING: torch.zeros(128, 8)}), MODEL, 128)


@pytest.mark.parametrize(
    "config, tensors, words",
    [
        (
            {"model": vars(MODEL) | {"num_layers": 3}},
            {EMBEDDING: torch.zeros(128, 8)},
            "--num-layers is 3 in the checkpoint and 2",
        ),
        (None, {EMBEDDING: torch.zeros(256, 8)}, "have 256 rows in their embedding"),
        (None, {"model.embed_tokens.weight": torch.zeros(128, 8)}, "its names are not those of this package"),
        ([1], {EMBEDDING: torch.zeros(128, 8)}, "config.json cannot be read"),
        ({"model": {"num_layers": 2}}, {EMBEDDING: torch.zeros(128, 8)}, "config.json is incomplete"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, config, tensors, words):
    with pytest.raises(WeightsError, match=words):
        check_portable(write(tmp_path / "w", config, **tensors), MODEL, 128)


def test_rope_may_be_changed_on_purpose(tmp_path):
    config = {"model": vars(MODEL) | {"rotary_position_embeddings_theta": 5e5, "use_rotary_position_embeddings": True}}
    weights = write(tmp_path / "w", config, **{EMBEDDING: torch.zeros(128, 8)})
    model = replace(MODEL, use_rotary_position_embeddings=True)
    with pytest.raises(WeightsError, match=r"theta is 500000.0 .*; add --change-rope"):
        check_portable(weights, model, 128)
    check_portable(weights, model, 128, change_rope=True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_may_be_there_under_both_names(tmp_path):
    weight = torch.zeros(5, 3)
    check_parameters(Tied(), source(write(tmp_path / "one", **{"embedding.weight": weight})))
    check_parameters(Tied(), source(write(tmp_path / "two", **{"embedding.weight": weight, "head.weight": weight})))


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"head.weight": torch.zeros(5, 3)}, "embedding.weight is missing"),
        ({"embedding.weight": torch.zeros(5, 3), "scale": torch.zeros(1)}, "scale is no parameter of the model"),
        ({"embedding.weight": torch.zeros(4, 3)}, r"embedding.weight is \[4, 3\] where the model has \[5, 3\]"),
        (
            {"embedding.weight": torch.zeros(5, 3), **{f"x{number}": torch.zeros(1) for number in range(5)}},
            "x2 is no parameter of the model and 2 more",
        ),
    ],
)
def test_names_and_shapes_that_do_not_match_are_reported(tmp_path, tensors, words):
    with pytest.raises(WeightsError, match=words):
        check_parameters(Tied(), source(write(tmp_path / "w", **tensors)))


def test_the_newest_checkpoint_is_the_one_that_latest_names(tmp_path):
    write(tmp_path / "run" / "global_step7", a=torch.ones(2))
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run" / "latest").write_text("global_step7\n")
    newest = newest_checkpoint(tmp_path / "run")
    assert (newest, is_portable(newest), kind_of(newest)) == (tmp_path / "run" / "global_step7", True, "safetensors")
    opened = open_state(tmp_path / "run")
    assert (opened.step, opened.names, opened.parts("a")) == (None, ("a",), (WEIGHTS,))
    assert opened.read("a", WEIGHTS, 1, 1).tolist() == [1.0]


@pytest.mark.parametrize("read", [open_model, partial(check_portable, model=MODEL, padded_vocab_size=8)])
def test_weights_of_a_hugging_face_model_are_refused_by_name(tmp_path, read):
    (tmp_path / "config.json").write_text('{"model": {"hf_config": {"model_type": "qwen3"}}}')
    with pytest.raises(WeightsError, match=r"of a Hugging Face model \(qwen3, --hf-model\), .* to-hf \S+ OUT\. tr"):
        read(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="holds no weights"):
        open_state(tmp_path)
    with pytest.raises(WeightsError, match="is not there"):
        open_state(tmp_path / "absent")
