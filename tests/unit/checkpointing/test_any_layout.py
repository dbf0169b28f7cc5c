"""Weights that belong to no layout are found where checkpoints are; a manifest, where they have one, is verified."""

from pathlib import Path

import pytest
import torch

from megatron.checkpointing import CheckpointError, check_checkpoint, find_checkpoint
from megatron.config import CheckpointConfig
from megatron.weights.errors import WeightsError
from megatron.weights.manifest import seal
from megatron.weights.safetensors_folder import SafetensorsWriter
from tests.unit.checkpointing.pretend import CONTEXT, PADDED_VOCAB_SIZE, choose, config, flip_a_byte

EMBEDDING = "embedding.word_embeddings.weight"


def write_portable(folder: Path, with_manifest: bool = False) -> Path:
    with SafetensorsWriter(folder, with_manifest=with_manifest) as writer:
        writer.add(EMBEDDING, torch.zeros(PADDED_VOCAB_SIZE, 64))
    return folder


def found(folder: Path) -> Path | None:
    return find_checkpoint(CheckpointConfig(load=str(folder)))


def test_a_folder_of_portable_weights_is_the_checkpoint(tmp_path: Path) -> None:
    assert found(write_portable(tmp_path / "weights")) == tmp_path / "weights"


def test_weights_may_lie_where_the_run_saves(tmp_path: Path) -> None:
    write_portable(tmp_path, with_manifest=True)
    unfinished = tmp_path / f"global_step1.{'0' * 32}.tmp"
    unfinished.mkdir()
    (unfinished / "mp_rank_00_model_states.pt").touch()
    assert found(tmp_path) == tmp_path
    write_portable(tmp_path / "global_step3")
    (tmp_path / "latest").write_text("global_step3")
    assert found(tmp_path) == tmp_path / "global_step3"


@pytest.mark.usefixtures("only_rank")
def test_portable_weights_are_verified_where_they_have_a_manifest(tmp_path: Path) -> None:
    path = write_portable(tmp_path / "weights", with_manifest=True)
    assert choose(path) == path
    flip_a_byte(path / "model.safetensors")
    assert choose(path, "--no-verify-checkpoint") == path
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: its SHA-256"):
        choose(path)


@pytest.mark.usefixtures("only_rank")
def test_a_universal_checkpoint_without_a_manifest_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONTEXT.log, "propagate", True)
    (tmp_path / "zero").mkdir()
    torch.save({"step": 4}, tmp_path / "zero" / "optimizer_state.pt")
    assert choose(tmp_path) == tmp_path
    assert caplog.messages == [f"{tmp_path} has no manifest.json: it is loaded unverified"]
    caplog.clear()
    seal(tmp_path)
    assert choose(tmp_path) == tmp_path
    assert caplog.messages == []


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
