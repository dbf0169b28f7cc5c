"""A checkpoint holds the config.json of the Hugging Face model that it is of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing import CheckpointError, Saver, check_checkpoint
from megatron.config import Config
from megatron.weights.manifest import read_manifest
from tests.unit.checkpointing.pretend import CONTEXT, PADDED_VOCAB_SIZE, STATE, PretendEngine, config
from tests.unit.hf.published_models import published

pytestmark = pytest.mark.usefixtures("only_rank")


def run_of(folder: Path, *flags: str) -> Config:
    run = config(*flags)
    return replace(run, model=replace(run.model, hf_model=str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published("llama", tmp_path / "llama")
    return tmp_path / "llama"


def test_the_models_config_travels_in_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    engine: Any = PretendEngine()
    checkpoint = Saver(engine, CONTEXT, run_of(folder), PADDED_VOCAB_SIZE).save(tmp_path / "saved", STATE)
    assert "hugging_face.json" in read_manifest(checkpoint)
    saved, own = (json.loads(file.read_text()) for file in (checkpoint / "hugging_face.json", folder / "config.json"))
    assert saved == own


def test_weights_alone_come_from_the_models_own_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder of weights, .* come from --hf-model"):
        check_checkpoint(folder, run_of(folder), 1, PADDED_VOCAB_SIZE)
