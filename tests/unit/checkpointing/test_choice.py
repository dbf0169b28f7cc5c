"""Which checkpoint is loaded, and what is said of those that cannot be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpointing import CheckpointError, find_checkpoint
from megatron.config import CheckpointConfig
from megatron.train_state import TrainState
from tests.unit.checkpointing.pretend import CONTEXT, choose, config, flip_a_byte, save

pytestmark = pytest.mark.usefixtures("only_rank")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the checkpoints of iterations 2, 4 and 10."""
    for iteration in (2, 4, 10):
        save(tmp_path, TrainState(iteration=iteration))
    return tmp_path


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _remove_a_size(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["files"]["weights.pt"]["size_bytes"]
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped byte": ("weights.pt", flip_a_byte, "weights.pt is damaged: its SHA-256 is not the one in manifest.json"),
    "truncated file": ("moments.pt", _cut, "moments.pt is damaged: it has 998 bytes, not 1000"),
    "missing shard": ("weights.pt", Path.unlink, "weights.pt is missing"),
    "missing random state": ("random_0.pt", Path.unlink, "random_0.pt is missing"),
    "flipped counters": ("train_state.json", flip_a_byte, "train_state.json is damaged"),
    "cut manifest": ("manifest.json", _cut, "manifest.json is damaged"),
    "manifest without a size": ("manifest.json", _remove_a_size, "manifest.json is damaged"),
    "no manifest": ("manifest.json", Path.unlink, "no manifest.json, .* --allow-unverified-checkpoint"),
    "stranger": ("more.pt", Path.touch, "more.pt is not listed in manifest.json"),
    "folder gone": ("", shutil.rmtree, "global_step10 is missing"),
}


def test_a_folder_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    for load in (None, str(tmp_path / "absent"), str(tmp_path)):
        assert find_checkpoint(CheckpointConfig(load=load)) is None
    assert choose(tmp_path) is None


def test_the_checkpoint_that_was_saved_last_is_chosen(folder: Path) -> None:
    assert (folder / "latest").read_text() == "global_step10"
    assert find_checkpoint(CheckpointConfig(load=str(folder))) == choose(folder) == folder / "global_step10"


def test_latest_may_be_set_back_by_hand(folder: Path) -> None:
    (folder / "latest").write_text("global_step4\n")
    assert choose(folder) == folder / "global_step4"


def test_without_latest_the_newest_is_chosen(folder: Path) -> None:
    (folder / "latest").unlink()
    assert choose(folder) == folder / "global_step10"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONTEXT.log, "propagate", True)
    name, spoil, expected = DAMAGES[damage]
    spoil(folder / "global_step10" / name)
    assert choose(folder) == folder / "global_step4"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(folder / "global_step10") in record.getMessage()
    with pytest.raises(CheckpointError, match=expected):
        choose(folder, "--ckpt-step", "10")


def test_one_that_was_asked_for_is_never_replaced(folder: Path) -> None:
    assert choose(folder, "--ckpt-step", "4") == folder / "global_step4"
    flip_a_byte(folder / "global_step4" / "weights.pt")
    with pytest.raises(CheckpointError, match=r"global_step4 cannot be loaded: weights.pt is damaged.*--ckpt-step"):
        choose(folder, "--ckpt-step", "4")
    with pytest.raises(CheckpointError, match="global_step6 is missing"):
        choose(folder, "--ckpt-step", "6")


def test_if_none_is_good_each_is_named_in_one_line(folder: Path) -> None:
    for path in folder.glob("global_step*"):
        flip_a_byte(path / "weights.pt")
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        choose(folder)
    for name in ("global_step10", "global_step4", "global_step2", "point --load elsewhere"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_the_hashes_alone_can_be_skipped(folder: Path) -> None:
    flip_a_byte(folder / "global_step10" / "weights.pt")
    assert choose(folder, "--no-verify-checkpoint") == folder / "global_step10"
    (folder / "global_step10" / "weights.pt").unlink()
    assert choose(folder, "--no-verify-checkpoint") == folder / "global_step4"


def test_one_without_a_manifest_is_loaded_if_the_user_says_so(folder: Path) -> None:
    (folder / "global_step10" / "manifest.json").unlink()
    assert choose(folder, "--allow-unverified-checkpoint") == folder / "global_step10"


def test_a_first_look_reads_no_large_file(folder: Path) -> None:
    settings = config("--load", str(folder)).checkpoint
    flip_a_byte(folder / "global_step10" / "weights.pt")
    assert find_checkpoint(settings) == folder / "global_step10"
    flip_a_byte(folder / "global_step10" / "config.json")
    assert find_checkpoint(settings) == folder / "global_step4"
