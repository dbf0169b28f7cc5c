"""One run at a time writes to a folder; an error names it to the next one, and a killed one locks nobody out."""

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.checkpointing import CheckpointError, only_writer
from megatron.checkpointing.lock import _acquire
from megatron.config import CheckpointConfig
from tests.unit.checkpointing.pretend import CONTEXT

pytestmark = pytest.mark.usefixtures("only_rank")


def locked(folder: Path) -> "contextmanager[None]":
    return only_writer(CheckpointConfig(save=str(folder)), CONTEXT)


@contextmanager
def another_run(folder: Path) -> Iterator[int]:
    """Let a process hold the lock until it is killed at the end; yield its id."""
    ready, is_ready = os.pipe()
    child = os.fork()
    if child == 0:
        _acquire(folder, CONTEXT)  # without the collective, which a forked process cannot join
        os.write(is_ready, b"x")
        signal.pause()
    try:
        os.read(ready, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(is_ready)


def test_the_second_run_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "saved"
    with another_run(folder) as process:
        before = (folder / "run.lock").read_text()
        words = (
            rf"^--save \({folder}\) is in use by another run: process {process} on host {socket.gethostname()}, since"
        )
        for _ in range(2):
            with pytest.raises(CheckpointError, match=words + r" \d{4}-.*; end that run, or name another folder\.$"):
                locked(folder).__enter__()
        assert (folder / "run.lock").read_text() == before
    assert (folder / "run.lock").exists()
    with locked(folder):  # the one that held it was killed
        assert f'"pid": {os.getpid()}' in (folder / "run.lock").read_text()
    assert list(folder.iterdir()) == []


def test_a_run_that_ends_leaves_no_lock_nor_an_empty_folder_that_it_made(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new"):
        raise ZeroDivisionError
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "global_step1").mkdir()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "used",
        "used/global_step1",
    ]


def test_a_run_that_saves_nothing_needs_no_lock(tmp_path: Path) -> None:
    with only_writer(CheckpointConfig(load=str(tmp_path)), CONTEXT):
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_run_before_has_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf, path = fcntl.lockf, tmp_path / "run.lock"
    calls = []

    def remove_once(descriptor: int, command: int) -> None:
        lockf(descriptor, command)
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "lockf", remove_once)
    with locked(tmp_path):
        assert len(calls) == 2
        assert path.exists()


@pytest.mark.parametrize(
    "plant, expected",
    [
        (lambda path: path.symlink_to("elsewhere"), "Too many levels of symbolic links"),
        (Path.mkdir, "Is a directory"),
    ],
)
def test_what_is_no_file_is_not_followed(tmp_path: Path, plant: Callable[[Path], object], expected: str) -> None:
    plant(tmp_path / "run.lock")
    with pytest.raises(CheckpointError, match=rf"cannot be locked: {expected}.*; remove {tmp_path}/run.lock"):
        locked(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(CONTEXT.log, "propagate", True)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path):
        assert "knows no locks: see to it that no second run" in caplog.text
