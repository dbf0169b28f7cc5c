"""Atomic files: written under a temporary name, flushed to disk, then renamed, so that only complete files appear."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

SHARED_CHARACTERS = 50  # of the final name in a temporary name; at four bytes each, the latter still fits


def temporary_path(path: Path) -> Path:
    """Return a new name next to `path` that no other process uses, on this or another machine that shares the disk."""
    return path.with_name(f"{path.name[:SHARED_CHARACTERS]}.{uuid4().hex}.tmp")


def flush_to_disk(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete file to its final name, replacing any file of that name."""
    flush_to_disk(temporary)
    os.replace(temporary, path)
    flush_to_disk(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` if the block succeeds, else delete it."""
    temporary = temporary_path(path)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
