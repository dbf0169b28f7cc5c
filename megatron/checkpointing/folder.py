"""The folder that checkpoints are in: their names, `latest`, what killed runs left, and deleting."""

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
    """Where the checkpoint of an iteration is."""
    return folder / f"global_step{iteration}"


def unfinished_path(path: Path) -> Path:
    """A name beside `path` under which it is written."""
    return temporary_path(path)


def write_latest(folder: Path, path: Path) -> None:
    """Let `latest` name a checkpoint: it names the old one or the new one, whatever happens."""
    with atomic_path(folder / LATEST) as temporary:
        temporary.write_text(path.name)


def checkpoints(folder: Path, last_iteration: int | None = None) -> list[Path]:
    """Complete checkpoints up to an iteration, newest first; of one that was being replaced, the old one too."""
    return [path for path in named_checkpoints(folder, last_iteration) if (path / MANIFEST).is_file()]


def named_checkpoints(folder: Path, last_iteration: int | None = None) -> list[Path]:
    """What has the name of a checkpoint, whole or not, up to an iteration, newest first.

    One that was being deleted is none once its manifest is gone.
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
    """The iteration in a checkpoint's name; None where the name has none."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def retire(path: Path) -> None:
    """Rename a checkpoint before it is deleted, so that no half of one ever has a good name."""
    os.rename(path, path.with_name(f"{path.name}.{uuid4().hex}.old"))
    flush_to_disk(path.parent)


def delete_unfinished(folder: Path) -> None:
    """Delete what saves that were killed left."""
    for path in _named(folder, _UNFINISHED):
        _delete(path)


def delete_retired(folder: Path) -> None:
    """Delete what was retired: the manifest first, so that a half of one is never taken for a checkpoint."""
    for path in _named(folder, _RETIRED):
        if path.is_dir() and not path.is_symlink():
            (path / MANIFEST).unlink(missing_ok=True)
            flush_to_disk(path)
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a folder with all that is in it, a file, or a link, whose target is left alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def keep_newest(folder: Path, last_iteration: int, count: int) -> None:
    """Retire all but the `count` newest complete checkpoints up to an iteration.

    Those of later iterations belong to an earlier run that went further, and are left.
    """
    for path in [path for path in checkpoints(folder, last_iteration) if not _RETIRED.fullmatch(path.name)][count:]:
        retire(path)


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
