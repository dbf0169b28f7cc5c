"""manifest.json: the files of a checkpoint, their sizes and their hashes.

{"files": {"layout.json": {"sha256": "5df6...", "size_bytes": 112}, ...}}

The hash is SHA-256: processors compute it in hardware, faster than BLAKE2, and `sha256sum` checks it by hand. It tells
a damaged file from a whole one. It is not a signature: whoever can change a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron.core.atomic_file import flush_to_disk
from megatron.weights.errors import WeightsError, first_line

MANIFEST = "manifest.json"
# Files that hold tensors or their index: one that the manifest does not list is an error.
_WEIGHT_FILES = ("*.pt", "*.safetensors", "*.safetensors.index.json")
# A folder of weights may also be the --save of a run; the checkpoints inside it are not part of the weights.
_CHECKPOINTS = "global_step"
_HASHING_THREADS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """The recorded size and hash of one file."""

    size_bytes: int
    sha256: str


Manifest = dict[str, FileEntry]
"""{path below the checkpoint, with forward slashes: the expected size and hash}."""

Selection = Callable[[Manifest], Iterable[str]]
"""Chooses the files of a checkpoint to hash."""


def describe_files(folder: Path, paths: Iterable[Path]) -> Manifest:
    """Return the entries of files below `folder`, hashed in parallel."""
    ordered = sorted(paths)
    entries = _side_by_side(lambda path: FileEntry(path.stat().st_size, _sha256(path)), ordered)
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(ordered, entries, strict=True)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and flush it to disk; the files that it lists must be on disk already."""
    content = {"files": {name: asdict(entry) for name, entry in manifest.items()}}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    flush_to_disk(folder / MANIFEST)


def flush_files(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for path in (*folder.rglob("*"), folder):
        flush_to_disk(path)


def seal(folder: Path, pattern: str = "*") -> None:
    """Write the manifest of a folder's files whose names match, and flush everything to disk."""
    files = [path for path in folder.rglob(pattern) if path.is_file()]
    write_manifest(folder, describe_files(folder, files))
    flush_files(folder)


def seal_safetensors(folder: Path) -> None:
    """Write the manifest of a folder's safetensors and their index, without config.json, which users may edit."""
    seal(folder, "*.safetensors*")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest; WeightsError if it is damaged."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: FileEntry(int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise WeightsError(f"{MANIFEST} is damaged ({first_line(error)})") from error


def find_faults(folder: Path, select: Selection) -> list[str]:
    """List how the files differ from the manifest: checks the sizes of all, and the hashes of those selected."""
    try:
        manifest = read_manifest(folder)
    except WeightsError as error:
        return [str(error)]
    return size_faults(folder, manifest) or hash_faults(folder, manifest, select(manifest))


def small_files(manifest: Manifest) -> list[str]:
    """Return the files that are small enough to hash in no time."""
    return [name for name in manifest if name.endswith(".json")]


def size_faults(folder: Path, manifest: Manifest) -> list[str]:
    """List files that are missing or have another size, and files of weights that the manifest does not list."""
    faults = [fault for name, entry in sorted(manifest.items()) if (fault := _size_fault(folder / name, name, entry))]
    found = {path.relative_to(folder).as_posix() for pattern in _WEIGHT_FILES for path in folder.rglob(pattern)}
    strangers = sorted(name for name in found - manifest.keys() if not name.startswith(_CHECKPOINTS))
    return [*faults, *(f"{name} is not listed in {MANIFEST}" for name in strangers)]


def hash_faults(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """List which of these files do not have the recorded hash."""
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
