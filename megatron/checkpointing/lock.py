"""The lock on --save: two runs that write to one folder would replace and delete each other's checkpoints.

It is a POSIX lock on DIR/run.lock: the kernel releases it when its process ends, however that ends, and NFS and Lustre
support it. The file names the holder. It is removed at the end of the run. After a kill the file stays, but locks
nobody out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpointing.agreement import on_first_rank
from megatron.checkpointing.errors import CheckpointError
from megatron.config import CheckpointConfig
from megatron.initialize import Context
from megatron.weights.errors import first_line

LOCK = "run.lock"
_HELD = {errno.EACCES, errno.EAGAIN}
_UNKNOWN_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class _Lock:
    """A lock that is held until `descriptor` is closed."""

    folder: Path
    descriptor: int
    made_folder: bool

    def release(self) -> None:
        """Remove the file while it is locked, so that no other run's file is removed; then unlock."""
        with suppress(OSError):
            (self.folder / LOCK).unlink()
        os.close(self.descriptor)
        if self.made_folder:
            with suppress(OSError):
                self.folder.rmdir()  # the run ended before it wrote anything


@contextmanager
def only_writer(settings: CheckpointConfig, context: Context) -> Iterator[None]:
    """Hold the lock on --save, by rank 0, while the block runs. Collective over all ranks.

    CheckpointError on every rank where another run holds it, or the folder cannot be created. A file system without
    locks gets a warning.
    """
    if settings.save is None:
        yield
        return
    folder = Path(settings.save)
    held: list[_Lock] = []  # on rank 0
    on_first_rank(lambda: held.append(_acquire(folder, context)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def _acquire(folder: Path, context: Context) -> _Lock:
    path = folder / LOCK
    made_folder = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            if not _lock(descriptor, path):
                context.log.warning("%s knows no locks: see to it that no second run has the same --save", folder)
            if _is_there(path, descriptor):
                break
            os.close(descriptor)  # the last holder removed it
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
    except OSError as error:
        raise CheckpointError(
            f"--save ({folder}) cannot be locked: {first_line(error)}; remove {path}, or name another folder."
        ) from error
    return _Lock(folder, descriptor, made_folder)


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the file; return False where the file system has no locks. CheckpointError where another run holds it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNKNOWN_HERE:
            return False
        os.close(descriptor)
        if error.errno not in _HELD:
            raise
        raise CheckpointError(
            f"--save ({path.parent}) is in use by another run: {_holder(path)}; end that run, or name another folder."
        ) from error
    return True


def _is_there(path: Path, descriptor: int) -> bool:
    """Return whether `path` is still the file of `descriptor`."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on host {holder['host']}, since {holder['since']}"
    except (OSError, LookupError, TypeError, ValueError):  # it is about to be written
        return f"{path} will say which"
