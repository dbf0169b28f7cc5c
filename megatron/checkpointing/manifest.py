"""manifest.json: which files a checkpoint consists of, how long they are, and their hashes.

{"files": {"layout.json": {"sha256": "5df6...", "size_bytes": 112}, ...}}

The hash is SHA-256: processors compute it in hardware, faster than they do BLAKE2, and `sha256sum` checks it by hand.
It tells a damaged file from a whole one; it is no signature, since who can change a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron.checkpointing.errors import first_line
from megatron.checkpointing.files import read_json, write_json

MANIFEST = "manifest.json"
_HASHING_THREADS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """What is known of one file."""

    size_bytes: int
    sha256: str


Manifest = dict[str, FileEntry]
"""Path below the checkpoint, with forward slashes: what the file must be."""


def describe_files(folder: Path, paths: Iterable[Path]) -> Manifest:
    """The entries of files below `folder`, hashed side by side."""
    ordered = sorted(paths)
    entries = _side_by_side(lambda path: FileEntry(path.stat().st_size, _sha256(path)), ordered)
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(ordered, entries, strict=True)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it; the files that it lists must be on the disk already."""
    write_json(folder / MANIFEST, {"files": {name: asdict(entry) for name, entry in manifest.items()}})


def read_manifest(folder: Path) -> Manifest:
    """Read it. CheckpointError, TypeError, ValueError, KeyError or AttributeError if it is damaged."""
    files = read_json(folder / MANIFEST)["files"]
    return {name: FileEntry(int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in files.items()}


def size_faults(folder: Path, manifest: Manifest) -> list[str]:
    """What is missing, longer or shorter than it must be, or a tensor file that nobody vouches for."""
    faults = [fault for name, entry in sorted(manifest.items()) if (fault := _size_fault(folder / name, name, entry))]
    strangers = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")} - manifest.keys())
    return [*faults, *(f"{name} is not listed in {MANIFEST}" for name in strangers)]


def hash_faults(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Which of these files hold other bytes than were written."""
    ordered = sorted(names)
    faults = _side_by_side(lambda name: _hash_fault(folder / name, name, manifest[name]), ordered)
    return [fault for fault in faults if fault]


def _size_fault(path: Path, name: str, entry: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({first_line(error)})"
    return None if size == entry.size_bytes else f"{name} is damaged: it has {size} bytes, not {entry.size_bytes}"


def _hash_fault(path: Path, name: str, entry: FileEntry) -> str | None:
    try:
        found = _sha256(path)
    except OSError as error:
        return f"{name} cannot be read ({first_line(error)})"
    return None if found == entry.sha256 else f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _side_by_side(work: Callable[..., T], items: list[str] | list[Path]) -> list[T]:
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        return list(threads.map(work, items))
