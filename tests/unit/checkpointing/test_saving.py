"""A checkpoint is there whole or not at all, at whatever moment a save is killed or fails."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron.arguments import parse_args
from megatron.checkpointing import CheckpointError, find_checkpoint
from megatron.checkpointing.folder import checkpoints
from megatron.checkpointing.train_state import TrainState
from megatron.config import CheckpointConfig, Config
from megatron.weights.manifest import hash_faults, read_manifest, size_faults
from tests.unit.checkpointing.pretend import CONTEXT, STATE, save, saver

FILES = {"config.json", "layout.json", "manifest.json", "random_0.pt", "run.yaml", "train_state.json"}
FILES |= {"weights.pt", "moments.pt"}
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # what Python tells of before it does it


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("only_rank")
class TestWhole:
    """Saves that nobody disturbs."""

    def test_the_manifest_lists_every_other_file(self, tmp_path: Path) -> None:
        path = save(tmp_path / "saved")
        assert names(path) == FILES
        assert read_manifest(path).keys() == FILES - {"manifest.json"}
        assert names(path.parent) == {"latest", "global_step7"}

    def test_the_configuration_that_wrote_a_checkpoint_is_saved(self, tmp_path: Path) -> None:
        path = save(tmp_path, STATE, "--swiglu")
        config = Config.from_dict(json.loads((path / "config.json").read_text()))
        assert config.model.swiglu
        assert parse_args(["--config", str(path / "run.yaml")]) == config

    def test_an_earlier_checkpoint_of_the_same_iteration_is_replaced(self, tmp_path: Path) -> None:
        save(tmp_path)
        path = save(tmp_path, TrainState(iteration=7, consumed_samples=56))
        assert names(tmp_path) == {"latest", "global_step7"}
        assert json.loads((path / "train_state.json").read_text())["consumed_samples"] == 56

    def test_only_the_newest_are_kept_if_so_asked(self, tmp_path: Path) -> None:
        for iteration in (20, 2, 4, 6, 10):
            save(tmp_path, TrainState(iteration=iteration), "--keep-last-n-checkpoints", "2")
        # 20 is of an earlier run that went further.
        assert names(tmp_path) == {"latest", "global_step6", "global_step10", "global_step20"}

    def test_every_file_reaches_the_disk_before_the_name_and_the_name_before_latest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def record_fsync(descriptor: int) -> None:
            fsync(descriptor)
            steps.append(f"flush {_short(Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path))}")

        def record_move(move: Callable[..., None]) -> Callable[..., None]:
            def moving(source: Path, target: Path) -> None:
                move(source, target)
                steps.append(f"name {_short(Path(target).relative_to(tmp_path))}")

            return moving

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "rename", record_move(rename))
        monkeypatch.setattr(os, "replace", record_move(replace))
        save(tmp_path)
        last = ["unfinished/manifest.json", "unfinished"]
        own = {"unfinished/" + name for name in FILES - {"weights.pt", "moments.pt", "manifest.json"}}
        assert set(steps[: len(own)]) == {f"flush {name}" for name in own}
        assert steps[len(own) :] == [
            *(f"flush {name}" for name in last),
            *("name global_step7", "flush .", "flush unfinished latest", "name latest", "flush ."),
        ]

    def test_leftovers_of_killed_saves_go_and_everything_else_stays(self, tmp_path: Path) -> None:
        hexadecimal = "0123456789abcdef" * 2
        (tmp_path / f"global_step3.{hexadecimal}.tmp").mkdir()
        (tmp_path / f"latest.{hexadecimal}.tmp").touch()
        others = {"global_step3.tmp", "notes.tmp", "global_step5", f"data.{hexadecimal}.tmp"}
        for name in others:
            (tmp_path / name).mkdir()
        save(tmp_path)
        assert names(tmp_path) == others | {"latest", "global_step7"}

    def test_leftovers_that_are_links_or_files_go_and_what_they_lead_to_stays(self, tmp_path: Path) -> None:
        folder, elsewhere = tmp_path / "saved", save(tmp_path / "elsewhere")
        folder.mkdir()
        hexadecimal = "0123456789abcdef" * 2
        for number, target in enumerate((elsewhere, elsewhere / "config.json", tmp_path / "absent")):
            for end in ("tmp", "old"):
                (folder / f"global_step{number}.{hexadecimal}.{end}").symlink_to(target)
        for end in ("tmp", "old"):
            (folder / f"global_step9.{hexadecimal}.{end}").touch()
        (folder / "latest").symlink_to(elsewhere.parent / "latest")
        (folder / "global_step7").symlink_to(elsewhere)
        for iteration in (7, 8):
            path = save(folder, TrainState(iteration=iteration), "--keep-last-n-checkpoints", "1")
            assert names(folder) == {"latest", path.name}
            assert not (folder / "latest").is_symlink()
            assert not path.is_symlink()
        assert (elsewhere.parent / "latest").read_text() == "global_step7"
        assert names(elsewhere) == FILES

    def test_a_name_that_leads_nowhere_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "global_step7").symlink_to("absent")
        assert names(save(tmp_path)) == FILES
        assert names(tmp_path) == {"latest", "global_step7"}


@pytest.mark.usefixtures("only_rank")
class TestFailure:
    """Saves that cannot succeed."""

    @pytest.mark.parametrize(
        "error, expected",
        [
            (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
            (RuntimeError("[enforce fail]\nmore"), r"RuntimeError: \[enforce fail\];"),
        ],
    )
    def test_a_failed_save_is_removed_and_the_earlier_one_stands(
        self, tmp_path: Path, error: Exception, expected: str
    ) -> None:
        path = save(tmp_path)
        with pytest.raises(CheckpointError, match=rf"global_step9 cannot be saved: {expected}.*--load"):
            saver(tmp_path, error=error).save(tmp_path, TrainState(iteration=9))
        assert names(tmp_path) == {"latest", "global_step7"}
        assert find_checkpoint(CheckpointConfig(load=str(tmp_path))) == path

    def test_too_little_space_for_another_one_is_seen_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saves = saver(tmp_path)
        saves.save(tmp_path, STATE)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match="GiB free, and the last checkpoint took"):
            saves.save(tmp_path, TrainState(iteration=9))
        assert names(tmp_path) == {"latest", "global_step7"}

    def test_a_file_that_rank_0_does_not_see_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron.checkpointing.saving.size_faults", lambda *_: ["shard.pt is missing"])
        with pytest.raises(CheckpointError, match=r"shard.pt is missing for rank 0; --save must name"):
            save(tmp_path)
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("end", ["tmp", "old"])
    def test_what_cannot_be_deleted_is_no_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: str
    ) -> None:
        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(CONTEXT.log, "propagate", True)
        (tmp_path / f"global_step3.{'0' * 32}.{end}").mkdir()
        monkeypatch.setattr(shutil, "rmtree", refuse)
        save(tmp_path)
        assert f"{tmp_path} cannot be deleted: Permission denied" in caplog.text

    def test_an_old_checkpoint_that_cannot_be_deleted_is_no_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(CONTEXT.log, "propagate", True)
        save(tmp_path)
        monkeypatch.setattr(shutil, "rmtree", refuse)
        save(tmp_path, TrainState(iteration=9), "--keep-last-n-checkpoints", "1")
        assert "cannot be deleted: Permission denied" in caplog.text
        assert (tmp_path / "latest").read_text() == "global_step9"


@pytest.mark.parametrize("iteration", [6, 4], ids=["new", "replaced"])
def test_a_save_killed_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, iteration: int) -> None:
    start = tmp_path / "start"
    for earlier in (2, 4):
        assert _in_a_child(lambda earlier=earlier: save(start, TrainState(iteration=earlier))) == 0
    num_steps = 0
    while True:
        folder = tmp_path / f"killed_at_{num_steps}"
        shutil.copytree(start, folder)
        killed = _in_a_child(lambda folder=folder, step=num_steps: _save_and_die(folder, iteration, step))
        _assert_whole(folder, {4, iteration})
        if killed == 0:
            break
        assert killed == -signal.SIGKILL
        assert _in_a_child(lambda folder=folder: save(folder, TrainState(iteration=8))) == 0
        _assert_whole(folder, {8})
        assert [name for name in names(folder) if name.endswith((".tmp", ".old"))] == []
        num_steps += 1
    assert num_steps > 20
    assert names(folder) == {"latest", "global_step4", f"global_step{2 if iteration == 4 else 6}"}


def _short(path: Path) -> str:
    unfinished = path.parts and path.parts[0].endswith(".tmp")
    if not unfinished:
        return str(path)
    return "unfinished latest" if path.name.startswith("latest.") else "/".join(("unfinished", *path.parts[1:]))


def _save_and_die(folder: Path, iteration: int, step: int) -> None:
    """Save, and be killed just before the given step in the folder."""
    steps_left = step

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal steps_left
        # shutil.rmtree names a file by itself, and its folder by a descriptor.
        if event in EVENTS and (str(arguments[0]).startswith(str(folder)) or event in ("os.remove", "os.rmdir")):
            steps_left -= 1
            if steps_left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save(folder, TrainState(iteration=iteration), "--keep-last-n-checkpoints", "2")


def _assert_whole(folder: Path, iterations: set[int]) -> None:
    path = find_checkpoint(CheckpointConfig(load=str(folder)))
    assert path is not None
    for complete in {path, *checkpoints(folder)}:
        manifest = read_manifest(complete)
        assert size_faults(complete, manifest) == hash_faults(complete, manifest, manifest) == []
    assert json.loads((path / "train_state.json").read_text())["iteration"] in iterations


def _in_a_child(work: Callable[[], object]) -> int:
    """Run as the only rank of a world in a process of its own; returns how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store = dist.HashStore()
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
