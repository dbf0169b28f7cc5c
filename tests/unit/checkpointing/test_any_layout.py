"""Weights that belong to no layout are found where checkpoints are, and need no manifest: reading them runs no code."""

from pathlib import Path

import pytest
import torch

from megatron.checkpointing import check_checkpoint, find_checkpoint
from megatron.config import CheckpointConfig
from megatron.weights.errors import WeightsError
from megatron.weights.safetensors_folder import SafetensorsWriter
from tests.unit.checkpointing.pretend import PADDED_VOCAB_SIZE, config

EMBEDDING = "embedding.word_embeddings.weight"


def write_portable(folder: Path) -> Path:
    with SafetensorsWriter(folder) as writer:
        writer.add(EMBEDDING, torch.zeros(PADDED_VOCAB_SIZE, 64))
    return folder


def found(folder: Path) -> Path | None:
    return find_checkpoint(CheckpointConfig(load=str(folder)))


def test_a_folder_of_portable_weights_is_the_checkpoint(tmp_path: Path) -> None:
    assert found(write_portable(tmp_path / "weights")) == tmp_path / "weights"


def test_portable_weights_and_universal_checkpoints_may_be_the_newest_checkpoint(tmp_path: Path) -> None:
    write_portable(tmp_path / "global_step3")
    (tmp_path / "global_step4" / "zero").mkdir(parents=True)
    torch.save({"step": 4}, tmp_path / "global_step4" / "zero" / "optimizer_state.pt")
    for name in ("global_step3", "global_step4"):
        (tmp_path / "latest").write_text(name)
        assert found(tmp_path) == tmp_path / name


def test_portable_weights_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    path = write_portable(tmp_path / "weights")
    check_checkpoint(path, config(), 1, PADDED_VOCAB_SIZE)
    with pytest.raises(WeightsError, match=f"have {PADDED_VOCAB_SIZE} rows in their embedding"):
        check_checkpoint(path, config(), 1, 2 * PADDED_VOCAB_SIZE)
