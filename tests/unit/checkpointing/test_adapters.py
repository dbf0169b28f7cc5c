"""A checkpoint of adapters is resumed with the same adapters on the same weights, and refused otherwise."""

import json
from dataclasses import replace

import pytest
import torch

from megatron.checkpointing import CheckpointError
from megatron.checkpointing.adapters import base_digest, check_adapters
from megatron.config import AdaptersConfig, Config, ModelConfig, OptimizerConfig
from megatron.weights.published_config import BASE_FILE
from tests.unit.hf.tiny_models import build

LORA = AdaptersConfig(lora_rank=4)


@pytest.fixture
def config(tmp_path):
    build("llama", torch.float32).save_pretrained(tmp_path / "base")
    sizes = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 64}
    model = ModelConfig(hf_model=str(tmp_path / "base"), **sizes)
    config = Config(model=model, optimizer=OptimizerConfig(lr=1.0), adapters=LORA)
    (tmp_path / BASE_FILE).write_text(json.dumps({"digest": base_digest(config)}))
    return config


def test_the_same_adapters_are_resumed(config, tmp_path):
    check_adapters(tmp_path, LORA, config)
    check_adapters(tmp_path, replace(LORA, lora_alpha=8.0, lora_dropout=0.1), config)


@pytest.mark.parametrize(
    "saved, message",
    [
        (AdaptersConfig(), r"holds all weights of a model, and this run trains adapters .* remove them"),
        (AdaptersConfig(lora_rank=8), r"--lora-rank 8, and this run has --lora-rank 4"),
        (replace(LORA, lora_alpha=4.0), r"--lora-alpha 4.0, and this run has --lora-alpha 8.0"),
        (replace(LORA, lora_target_modules=("q_proj",)), r"--lora-target-modules"),
        (replace(LORA, use_dora=True), "--use-dora"),
    ],
)
def test_other_adapters_are_refused(config, tmp_path, saved, message):
    with pytest.raises(CheckpointError, match=message):
        check_adapters(tmp_path, saved, config)


def test_adapters_are_refused_without_adapters_and_on_other_weights(config, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds adapters .* add the --lora flags"):
        check_adapters(tmp_path, LORA, replace(config, adapters=AdaptersConfig()))
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    model.save_pretrained(tmp_path / "other")
    other = replace(config, model=replace(config.model, hf_model=str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match="trained on other weights than those of --hf-model"):
        check_adapters(tmp_path, LORA, other)
