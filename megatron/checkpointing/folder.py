"""The folder of checkpoints: their names, `latest`, leftovers of killed runs, and deletion."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from uuid import uuid4

from megatron.core.atomic_file import atomic_path, flush_to_disk, temporary_path
from megatron.weights.manifest import MANIFEST
from megatron.weights.opening import LATEST

_CHECKPOINT = re.compile(r"global_step(\d+)(\.[0-9a-f]{32}\.old)?")
_UNFINISHED = re.compile(r"(global_step\d+|latest)\.[0-9a-f]{32}\.tmp")
_RETIRED = re.compile(r"global_step\d+\.[0-9a-f]{32}\.old")


def checkpoint_path(folder: Path, iteration: int) -> Path:
    """Return the path of the checkpoint of an iteration."""
    return folder / f"global_step{iteration}"


def unfinished_path(path: Path) -> Path:
    """Return a temporary name next to `path`, under which the checkpoint is written."""
    return temporary_path(path)


def write_latest(folder: Path, path: Path) -> None:
    """Point `latest` to a checkpoint, atomically: it names the old one or the new one, whatever happens."""
    with atomic_path(folder / LATEST) as temporary:
        temporary.write_text(path.name)


def checkpoints(folder: Path, last_iteration: int | None = None) -> list[Path]:
    """List complete checkpoints up to an iteration, newest first; includes the old one of a pair being replaced."""
    return [path for path in named_checkpoints(folder, last_iteration) if (path / MANIFEST).is_file()]


def named_checkpoints(folder: Path, last_iteration: int | None = None) -> list[Path]:
    """List everything with the name of a checkpoint, complete or not, up to an iteration, newest first.

    A checkpoint that was being deleted is left out once its manifest is gone.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match is None or (match[2] and not (path / MANIFEST).is_file()):
            continue
        if last_iteration is None or int(match[1]) <= last_iteration:
            found.append((-int(match[1]), path.name, path))
    return [path for *_, path in sorted(found)]


def iteration_of(path: Path) -> int | None:
    """Return the iteration in a checkpoint's name; None where the name has none."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def retire(path: Path) -> None:
    """Rename a checkpoint before it is deleted, so that a half-deleted one never has a valid name."""
    os.rename(path, path.with_name(f"{path.name}.{uuid4().hex}.old"))
    flush_to_disk(path.parent)


def delete_unfinished(folder: Path) -> None:
    """Delete the leftovers of killed saves."""
    for path in _named(folder, _UNFINISHED):
        _delete(path)


def delete_retired(folder: Path) -> None:
    """Delete retired checkpoints: the manifest first, so that a half-deleted one is never taken for a checkpoint."""
    for path in _named(folder, _RETIRED):
        if path.is_dir() and not path.is_symlink():
            (path / MANIFEST).unlink(missing_ok=True)
            flush_to_disk(path)
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a folder with its contents, a file, or a link without its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def keep_newest(folder: Path, last_iteration: int, count: int) -> None:
    """Retire all but the `count` newest complete checkpoints up to an iteration.

    Those of later iterations belong to an earlier run that went further, and are not touched.
    """
    for path in [path for path in checkpoints(folder, last_iteration) if not _RETIRED.fullmatch(path.name)][count:]:
        retire(path)


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
