"""Files that appear only when they are whole: written under another name, flushed to the disk, renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

SHARED_CHARACTERS = 50  # of the final name in a temporary one: with four bytes each, and the rest, it is no longer


def temporary_path(path: Path) -> Path:
    """A new name beside `path`, which no other process uses, on this machine or on another that shares the disk."""
    return path.with_name(f"{path.name[:SHARED_CHARACTERS]}.{uuid4().hex}.tmp")


def flush_to_disk(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a whole file its final name, replacing what had that name."""
    flush_to_disk(temporary)
    os.replace(temporary, path)
    flush_to_disk(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a name to write to; it becomes `path` if the block succeeds and vanishes if it does not."""
    temporary = temporary_path(path)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
