"""Folder in which datasets are written until they are complete, and from which an interrupted run resumes.

    PREFIX.preprocessing/
        lock              held by the process that is writing
        inputs.json       every input file with its size and times of change, as they were at the start
        note.json         the settings, and the position reached
        KEY.bin           tokens so far, and perhaps some more than the note counts
        KEY.sizes         int32, tokens of each document so far
        KEY.idx           when all input is read

A note counts only data that reached the disk before it, and is replaced atomically. At the end the files are moved to
their final place, .bin before .idx, and the folder is removed.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron.core.atomic_file import atomic_path, publish
from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.data.index_file import write_index
from megatron.data.indexed_dataset import index_path, token_path
from megatron.data.text_files import InputPosition

WORKSPACE_VERSION = 2

InputStates = list[tuple[str, int, int, int]]
"""(name, bytes, mtime in ns, ctime in ns) of every input file.

A program can set mtime back but not ctime, so an edit that hides its mtime is still detected.
"""


@dataclass(frozen=True)
class Mark:
    """A position in the input, and the documents and tokens of each dataset written up to there."""

    position: InputPosition
    written: tuple[tuple[int, int], ...]
    bad_records: int = 0


@dataclass(frozen=True)
class Note:
    """A run's progress: the last mark, the mark at the start of its input file, and whether all input is read."""

    mark: Mark
    start_of_file: Mark
    is_finished: bool = False


class PartialDataset:
    """A dataset of one-sequence documents, being written to a workspace; opening truncates it to a mark's counts."""

    def __init__(self, folder: Path, name: str, dtype: npt.DTypeLike, num_documents: int, num_tokens: int) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_documents, self.num_tokens = num_documents, num_tokens
        self._folder, self._name = folder, name
        self._token_file = _open_at(self._path("bin"), num_tokens * self.dtype.itemsize)
        self._size_file = _open_at(self._path("sizes"), num_documents * 4)

    @property
    def written(self) -> tuple[int, int]:
        """Documents and tokens written so far."""
        return self.num_documents, self.num_tokens

    def add_documents(self, tokens: npt.NDArray[Any], sizes: npt.NDArray[np.int32]) -> None:
        """Append documents that are concatenated in `tokens`; those of size 0 are left out."""
        kept = sizes[sizes > 0]
        self._token_file.write(tokens.astype(self.dtype, copy=False).data)
        self._size_file.write(kept.astype("<i4", copy=False).data)
        self.num_documents += len(kept)
        self.num_tokens += len(tokens)

    def flush(self) -> None:
        """Wait until everything added is on disk."""
        for file in (self._token_file, self._size_file):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the index; nothing may be added after."""
        self.close()
        sizes = np.fromfile(self._path("sizes"), dtype="<i4")
        with atomic_path(self._path("idx")) as path, path.open("wb") as file:
            write_index(file, self.dtype, sizes, np.arange(len(sizes) + 1, dtype=np.int64))

    def close(self) -> None:
        self._token_file.close()
        self._size_file.close()

    def _path(self, ending: str) -> Path:
        return self._folder / f"{self._name}.{ending}"


class Workspace:
    """A locked workspace for some inputs and settings; see the module's docstring.

    A context manager. `settings`, by flag name, determine the output. Raises DataError if another process is using the
    workspace, or if an interrupted run differs in a setting or in a file that it has read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], inputs: Sequence[Path], restart: bool) -> None:
        self.folder = folder
        self.note: Note | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder / "lock")
        try:
            self._settings = dict(settings)
            self._inputs = _states_of(inputs)
            if restart:
                self._clear()
            self.note = self._note_to_resume_from()
            if self.note is None:
                self._clear()
            _write_json(folder / "inputs.json", self._inputs)
        except BaseException:
            self._leave()
            raise

    def open_dataset(self, name: str, dtype: npt.DTypeLike, written: tuple[int, int]) -> PartialDataset:
        """Open the dataset `name`, truncated to the documents and tokens of a mark."""
        return PartialDataset(self.folder, name, dtype, *written)

    def save(self, note: Note, datasets: Sequence[PartialDataset]) -> None:
        """Save a position from which to resume."""
        for dataset in datasets:
            dataset.flush()
        content = {"version": WORKSPACE_VERSION, "settings": self._settings, **asdict(note)}
        _write_json(self.folder / "note.json", content)
        self.note = note

    def check_unchanged(self, number: int) -> None:
        """Raise DataError if input `number` has changed since the start."""
        name, *_ = self._inputs[number]
        if _states_of([Path(name)]) != [self._inputs[number]]:
            raise DataError(f"{name} was changed while it was read; run again once it is whole.")

    def publish(self, prefixes: Mapping[str, str]) -> None:
        """Move finished datasets, by name, to their prefixes; one that an earlier run has moved stays."""
        for name, prefix in prefixes.items():
            tokens, index = self.folder / f"{name}.bin", self.folder / f"{name}.idx"
            # A new .bin must never be paired with an old .idx.
            if tokens.exists():
                index_path(prefix).unlink(missing_ok=True)
                publish(tokens, token_path(prefix))
            if index.exists():
                publish(index, index_path(prefix))
        self._clear()
        self.note = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Release the lock, and remove a folder without a note: no run can resume from it."""
        if not (self.folder / "note.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _clear(self) -> None:
        # The note first: the data that it counts must exist.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != "note.json"):
            if path.name != "lock":
                path.unlink()

    def _note_to_resume_from(self) -> Note | None:
        """Return the note of an interrupted run, moved back to the start of its input file if that file has changed."""
        found = _read_json(self.folder / "note.json")
        before = _read_json(self.folder / "inputs.json")
        if not isinstance(found, dict) or not isinstance(before, list):
            return None
        try:
            note = Note(_mark(found["mark"]), _mark(found["start_of_file"]), found["is_finished"])
            self._check_settings(found["settings"])
            if found["version"] != WORKSPACE_VERSION:
                raise KeyError("version")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.folder} was left by another version; {RESTART}.") from error
        self._check_inputs_read(before, note.mark.position.file)
        if note.is_finished and len(before) != len(self._inputs):
            note = replace(note, is_finished=False)
        current = note.mark.position.file
        if not note.is_finished and self._inputs[current : current + 1] != _states(before)[current : current + 1]:
            return replace(note, mark=note.start_of_file)
        return note

    def _check_settings(self, before: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self._settings))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise DataError(
                    f"{name} is {now.get(name)!r} and was {before.get(name)!r} in the interrupted run that "
                    f"{self.folder} is of; use the same again to resume, or {RESTART}."
                )

    def _check_inputs_read(self, before: list[Any], num_read: int) -> None:
        """Raise DataError unless the files already read are still the first inputs, unchanged."""
        states = _states(before)[:num_read]
        for number, state in enumerate(states):
            if number >= len(self._inputs) or self._inputs[number] != state:
                now = self._inputs[number][0] if number < len(self._inputs) else "nothing"
                what = "has changed" if now == state[0] else f"is now {now}"
                raise DataError(
                    f"input {number + 1} of the interrupted run that {self.folder} is of, {state[0]}, {what}; "
                    f"{RESTART}."
                )


RESTART = "give --restart to start over"


def _mark(content: dict[str, Any]) -> Mark:
    written = tuple((int(documents), int(tokens)) for documents, tokens in content["written"])
    return Mark(InputPosition(**content["position"]), written, int(content["bad_records"]))


def _states_of(paths: Sequence[Path]) -> InputStates:
    status = [(str(path.absolute()), path.stat()) for path in paths]
    return [(name, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in status]


def _states(content: list[Any]) -> InputStates:
    return [(name, size, modified, changed) for name, size, modified, changed in content]


def _open_at(path: Path, num_bytes: int) -> BinaryIO:
    """Open a file for writing after its first `num_bytes` bytes; the rest is dropped."""
    if num_bytes and (not path.exists() or path.stat().st_size < num_bytes):
        raise DataError(f"{path} has fewer than the {num_bytes} bytes that were written to it; {RESTART}.")
    file = path.open("r+b" if num_bytes else "wb")
    file.truncate(num_bytes)
    file.seek(num_bytes)
    return file


def _locked(path: Path) -> BinaryIO:
    """Lock a file for this process; the lock is released when the process ends."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise DataError(
            f"{path.parent} is in use by another process that writes the same output; wait for it, or give another "
            "--output-prefix."
        ) from error
    return file


def _read_json(path: Path) -> Any:
    """Read a JSON file; None if it is missing or incomplete."""
    try:
        return parse_json(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content))
