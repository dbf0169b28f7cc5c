"""Reader of files of conversations: JSON lines, one JSON array, Parquet, or a folder of Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.data.json_records import DEFAULT_MAX_DOCUMENT_MB, TooLong, bytes_of, is_array, read_entries, read_lines
from megatron.data.packed_files import open_unpacked
from megatron.data.parquet_files import read_objects
from megatron.data.saved_datasets import find_dataset, is_saved, read_dataset
from megatron.finetuning.chat_formats import KEYS, format_of, parse_record
from megatron.finetuning.conversations import TrainingRecord

FileKind = Literal["JSON lines", "JSON array", "Parquet", "datasets folder"]
NUMBERED: dict[FileKind, str] = {
    "JSON lines": "line",
    "JSON array": "entry",
    "Parquet": "row",
    "datasets folder": "row",
}
PARQUET = ".parquet"


@dataclass(frozen=True)
class RawRecord:
    """A record of a file, not yet parsed: its number from 1, and its JSON text or its values."""

    path: Path
    kind: FileKind
    number: int
    content: bytes | TooLong | dict[str, Any]

    @property
    def place(self) -> str:
        """The line, entry or row."""
        return f"{NUMBERED[self.kind]} {self.number}"

    @property
    def where(self) -> str:
        """The file and the line, entry or row."""
        return f"{self.path}, {self.place}"

    def values(self) -> Any:
        """Return the JSON value. DataError if the record is too long or not JSON."""
        if isinstance(self.content, TooLong):
            raise self.content.error(self.where)
        if isinstance(self.content, dict):
            return self.content
        try:
            return parse_json(self.content.decode("utf-8-sig"))
        except ValueError as error:
            raise DataError(
                f"{self.where}: not JSON ({error}); every line, or entry of one array, must be one JSON object; "
                "repair it."
            ) from error


def kind_of(path: Path) -> FileKind:
    """Return the kind of a file or folder, by its content but for Parquet. DataError if it cannot be read."""
    if is_saved(path):
        return "datasets folder"
    if path.suffix == PARQUET:
        return "Parquet"
    return "JSON array" if is_array(path) else "JSON lines"


def where(path: Path, number: int) -> str:
    """Name a line, an entry of an array or a row, for a message."""
    return f"{path}, {NUMBERED[kind_of(path)]} {number}"


def content_files(path: Path) -> list[Path]:
    """Return the files whose content the conversations of `path` are."""
    return find_dataset(path).files if is_saved(path) else [path]


def read_records(path: Path, max_document_mb: int = DEFAULT_MAX_DOCUMENT_MB) -> Iterator[RawRecord]:
    """Yield the records of a file; empty lines are skipped. JSON files may be compressed (.gz, .zst).

    A record of more than `max_document_mb` MiB is not read into memory. DataError if the file is damaged.
    """
    kind, max_bytes = kind_of(path), bytes_of(max_document_mb)
    for number, content in enumerate(_contents(path, kind, max_bytes), start=1):
        if not isinstance(content, bytes) or content.strip():
            yield RawRecord(path, kind, number, content)


def read_conversations(
    path: Path, max_document_mb: int = DEFAULT_MAX_DOCUMENT_MB
) -> Iterator[tuple[int, TrainingRecord]]:
    """Yield the number of each record, from 1, and its conversation. DataError, naming it, if it is none."""
    for record in read_records(path, max_document_mb):
        values = record.values()
        try:
            yield record.number, parse_record(values, format_of(values))
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error


def _contents(path: Path, kind: FileKind, max_bytes: int) -> Iterator[bytes | TooLong | dict[str, Any]]:
    if kind == "datasets folder":
        yield from read_dataset(find_dataset(path), KEYS, max_bytes)
    elif kind == "Parquet":
        yield from read_objects(path, KEYS, max_bytes)
    else:
        with open_unpacked(path) as file:
            yield from read_entries(file, max_bytes, path) if kind == "JSON array" else read_lines(file, max_bytes)
