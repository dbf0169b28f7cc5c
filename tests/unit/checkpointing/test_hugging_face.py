"""A checkpoint says which Hugging Face model it is of, and a run of another one does not load it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing import CheckpointError, Saver, check_checkpoint
from megatron.checkpointing.hugging_face import check_export_folder
from megatron.config import Config
from megatron.weights.manifest import read_manifest
from tests.unit.checkpointing.pretend import CONTEXT, PADDED_VOCAB_SIZE, STATE, PretendEngine, config, save
from tests.unit.hf.published_models import published

pytestmark = pytest.mark.usefixtures("only_rank")


def run_of(folder: Path, *flags: str) -> Config:
    run = config(*flags)
    return replace(run, model=replace(run.model, hf_model=str(folder)))


def changed(folder: Path, out: Path, **settings: Any) -> Path:
    """Write the config.json of a folder with other settings."""
    out.mkdir()
    content = {**json.loads((folder / "config.json").read_text()), **settings}
    (out / "config.json").write_text(json.dumps(content))
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published("llama", tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    engine: Any = PretendEngine()
    return Saver(engine, CONTEXT, run_of(folder), PADDED_VOCAB_SIZE).save(tmp_path / "saved", STATE)


def test_the_models_config_travels_in_its_checkpoint(folder: Path, checkpoint: Path) -> None:
    assert (checkpoint / "hugging_face.json").name in read_manifest(checkpoint)
    assert json.loads((checkpoint / "hugging_face.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_a_folder_of_the_same_model_elsewhere_is_accepted(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    moved = changed(folder, tmp_path / "moved", dtype="bfloat16", eos_token_id=3, transformers_version="4.0")
    check_checkpoint(checkpoint, run_of(moved), 1, PADDED_VOCAB_SIZE)
    longer = changed(folder, tmp_path / "longer", rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    with pytest.raises(CheckpointError, match=r"of another model than --hf-model .*: rope_parameters is .* there and"):
        check_checkpoint(checkpoint, run_of(longer), 1, PADDED_VOCAB_SIZE)
    check_checkpoint(checkpoint, run_of(longer, "--change-rope"), 1, PADDED_VOCAB_SIZE)


def test_a_run_of_another_model_is_refused(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 3 there and 2 here"):
        check_checkpoint(checkpoint, run_of(other), 1, PADDED_VOCAB_SIZE)
    with pytest.raises(CheckpointError, match="is of a Hugging Face model; name its folder with --hf-model"):
        check_checkpoint(checkpoint, config(), 1, PADDED_VOCAB_SIZE)
    with pytest.raises(CheckpointError, match="is of a GPT or LLaMA of this program; leave --hf-model out"):
        check_checkpoint(save(tmp_path / "native"), run_of(folder), 1, PADDED_VOCAB_SIZE)
    with pytest.raises(CheckpointError, match=r"is a folder of weights, .* come from --hf-model"):
        check_checkpoint(folder, run_of(folder), 1, PADDED_VOCAB_SIZE)


def test_the_folder_to_write_must_be_new(folder: Path, tmp_path: Path) -> None:
    check_export_folder(config())
    run = run_of(folder)
    for name in ("new", "llama"):
        with_export = replace(run, checkpoint=replace(run.checkpoint, save_hf=str(tmp_path / name)))
        if name == "new":
            check_export_folder(with_export)
            continue
        with pytest.raises(CheckpointError, match="llama exists and is not an empty folder"):
            check_export_folder(with_export)
