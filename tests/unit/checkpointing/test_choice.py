"""Which checkpoint is loaded, and what is said of those that cannot be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpointing import CheckpointError, choose_checkpoint, find_checkpoint
from megatron.checkpointing.train_state import TrainState
from megatron.config import CheckpointConfig
from megatron.weights.errors import WeightsError
from tests.unit.checkpointing.pretend import CONTEXT, as_deepspeed, choose, config, flip_a_byte, save

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


def _write_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").touch()


NOTHING: dict[str, tuple[Callable[[Path], object], str]] = {
    "typo": (lambda path: None, "is not there"),
    "file": (Path.touch, "is a file"),
    "empty folder": (Path.mkdir, "holds no checkpoint"),
    "other things": (_write_notes, "holds no checkpoint"),
    "long name": (lambda path: None, "cannot be read: File name too long"),
}
ASKING = ["--finetune", "--change-rope", "--no-load-optim", "--no-load-rng", "--universal-checkpoint"]


@pytest.mark.parametrize("what", NOTHING)
@pytest.mark.parametrize("flag", ["", *ASKING, "--allow-unverified-checkpoint", "--no-verify-checkpoint"])
def test_whoever_asks_for_weights_gets_them_or_an_error(tmp_path: Path, what: str, flag: str) -> None:
    make, expected = NOTHING[what]
    path = tmp_path / ("x" * 300 if what == "long name" else "load")
    make(path)
    before = sorted(tmp_path.rglob("*"))
    for output in ([], ["--save", str(tmp_path / "save")]):
        settings = config("--load", str(path), *output, *flag.split()).checkpoint
        for look in (find_checkpoint, lambda settings: choose_checkpoint(settings, CONTEXT)):
            with pytest.raises(CheckpointError, match=rf"^--load \({path}\) {expected}.*; name a folder") as caught:
                look(settings)
            assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_load_there_is_nothing_to_find() -> None:
    assert find_checkpoint(CheckpointConfig()) is None


@pytest.mark.parametrize("flag", ["", *ASKING])
def test_a_new_run_may_name_the_folder_that_it_will_save_to(tmp_path: Path, flag: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    unfinished, deleted = (f"global_step1.{'0' * 32}.{end}" for end in ("tmp", "old"))
    for leftovers in ([], [unfinished], [deleted, "run.lock", "tensorboard"]):
        for name in leftovers:
            (tmp_path / "real" / name).mkdir()
        for source, output in (("real", "link"), ("absent/../new", "new")):
            paths = ["--load", str(tmp_path / source), "--save", str(tmp_path / output)]
            settings = config(*paths, *flag.split()).checkpoint
            if flag == "--finetune":  # which asks for weights
                with pytest.raises(CheckpointError, match=r"holds no checkpoint|is not there"):
                    find_checkpoint(settings)
            else:
                assert find_checkpoint(settings) is choose_checkpoint(settings, CONTEXT) is None


def test_a_folder_whose_every_checkpoint_is_damaged_is_no_new_run(folder: Path) -> None:
    for path in folder.glob("global_step*"):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"global_step10 cannot be loaded: it has no manifest"):
        choose(folder, "--save", str(folder))
    (folder / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"step10 cannot be loaded: it has no manifest.*global_step2 cannot"):
        choose(folder, "--save", str(folder))


@pytest.mark.parametrize("flags", [[], ["--finetune"], ["--no-load-optim"], ["--ckpt-step", "4"]])
def test_a_checkpoint_itself_may_be_named(
    folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = as_deepspeed(folder / "global_step4")
    assert choose(path, *flags) == path
    monkeypatch.chdir(path)
    assert choose(Path("."), *flags) == choose(Path("../global_step4"), *flags) == path
    with pytest.raises(CheckpointError, match="global_step7 is missing"):
        choose(path, "--ckpt-step", "7")
    flip_a_byte(path / "moments.pt")
    with pytest.raises(CheckpointError, match=r"global_step4 cannot be loaded: moments.pt is damaged"):
        choose(path, *flags)


@pytest.mark.parametrize("name", ["../ev/global_step4", "/global_step4", "..", ".", "a\\b", "", "a\nb", "x" * 300])
def test_latest_is_a_plain_name_or_an_error(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder / "global_step4", tmp_path.parent / "ev" / "global_step4", dirs_exist_ok=True)
    (folder / "latest").write_text(name)
    for look in (find_checkpoint, lambda settings: choose_checkpoint(settings, CONTEXT)):
        with pytest.raises((WeightsError, CheckpointError), match=r"latest holds .* no name of a checkpoint; write"):
            look(config("--load", str(folder)).checkpoint)
    assert choose(folder, "--ckpt-step", "4") == folder / "global_step4"


def test_latest_that_is_a_folder_is_an_error(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("global_step4")
    with pytest.raises(CheckpointError, match=r"latest cannot be read \(Is a directory.*; write global_stepN into it"):
        choose(folder)


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
