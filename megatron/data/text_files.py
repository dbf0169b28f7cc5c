"""Documents from text: JSON lines, Parquet rows, or whole files; lines and files may be compressed (.gz, .zst).

Reading is cheap and sequential. Records are parsed later, in a worker process if there are several.
"""

import glob
import logging
import os
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.data.json_records import (
    BYTES_PER_READ,
    DEFAULT_MAX_DOCUMENT_MB,
    TooLong,
    bytes_of,
    is_array,
    read_entries,
    read_lines,
)
from megatron.data.packed_files import has_checksum, open_unpacked
from megatron.data.parquet_files import has_checksums, read_rows

INPUT_FORMATS = ("auto", "jsonl", "parquet", "text")
JSON_SUFFIXES = tuple(f".{name}{packing}" for name in ("jsonl", "json") for packing in ("", ".gz", ".zst"))
SUFFIXES = {
    "auto": (*JSON_SUFFIXES, ".parquet"),
    "jsonl": JSON_SUFFIXES,
    "parquet": (".parquet",),
    "text": ("",),
}
UNITS = {"jsonl": "line", "array": "entry", "parquet": "row", "text": "file"}
BYTES_PER_BATCH = 1 << 18
RECORDS_PER_BATCH = 1024
LOG = logging.getLogger("megatron")

Record = bytes | tuple[bytes | None, ...] | TooLong
"""The bytes of a line, an array entry or a file; the texts of a row; or the placeholder for a record too long."""


@dataclass(frozen=True)
class InputPosition:
    """A position between two records: after `record` records of input number `file`, and after all earlier files."""

    file: int = 0
    record: int = 0


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive, unparsed records of one file; `end` is the position after them."""

    path: str
    input_format: str
    keys: tuple[str, ...]
    first: int
    records: list[Record]
    end: InputPosition

    def where(self, index: int) -> str:
        """Name record `index` of the batch for a message."""
        if self.input_format == "text":
            return self.path
        return f"{self.path}, {UNITS[self.input_format]} {self.first + index + 1}"

    def texts(self, index: int) -> list[str] | None:
        """Parse the texts of record `index`, one per key; None for an empty line. The DataError names the record."""
        record = self.records[index]
        if isinstance(record, TooLong):
            raise record.error(self.where(index))
        if isinstance(record, tuple):
            return [
                _decode(self._present(cell, key, index), self.where(index))
                for key, cell in zip(self.keys, record, strict=True)
            ]
        if self.input_format == "text":
            return [_decode(record, self.where(index))]
        return _texts_of_line(record, self.keys, self.where(index)) if record.strip() else None

    def num_bytes(self, index: int) -> int:
        """Return the bytes of record `index` in the input, decompressed."""
        return _num_bytes(self.records[index])

    def _present(self, cell: bytes | None, key: str, index: int) -> bytes:
        if cell is None:
            raise DataError(f"{self.where(index)}: no text in the column {key!r}; {BAD_RECORD_ADVICE}.")
        return cell


BAD_RECORD_ADVICE = "repair it, or leave such records out (--skip-bad-lines of tools/preprocess_data.py)"


def find_inputs(inputs: Sequence[str], input_format: str) -> list[Path]:
    """Expand names, folders (searched to any depth) and patterns to files, sorted within each. DataError if
    one of them matches nothing."""
    files: list[Path] = []
    for name in inputs:
        found = _matching_files(name, SUFFIXES[input_format])
        if not found:
            kind = "jsonl or parquet" if input_format == "auto" else input_format
            raise DataError(
                f"--input ({name}) stands for no {kind} file; give an existing file, a folder that holds some, "
                "or a quoted pattern."
            )
        files += found
    return files


def read_batches(
    paths: Sequence[Path],
    input_format: str,
    keys: Sequence[str],
    start: InputPosition | None = None,
    max_document_mb: int = DEFAULT_MAX_DOCUMENT_MB,
) -> Iterator[RecordBatch]:
    """Yield the records of all files from `start` on; every file ends with a batch, possibly an empty one.

    "jsonl": a line is a JSON object, each key one of its texts, or the file is one array of such objects. "parquet": a
    row, each key a column. "text": a file is a document of one text, whatever the keys. "auto": Parquet by the ending
    .parquet, else jsonl. A record of more than `max_document_mb` MiB is refused when it is parsed. A warning names the
    first file without checksums whose format may have them. Raises DataError if a file cannot be read.
    """
    start, max_bytes = start or InputPosition(), bytes_of(max_document_mb)
    may_warn = True
    for number in range(start.file, len(paths)):
        path = paths[number]
        kind = _format_of(path, input_format)
        first = start.record if number == start.file else 0
        records = _read_records(path, kind, keys, first, max_bytes)
        for group, is_last in _grouped(records):
            end = InputPosition(number + 1) if is_last else InputPosition(number, first + len(group))
            yield RecordBatch(str(path), kind, tuple(keys), first, group, end)
            first += len(group)
        if may_warn and not _is_verifiable(path, kind, keys):
            LOG.warning("%s has no checksums, so that damage to it cannot be seen; no other file is named", path)
            may_warn = False


def read_documents(
    paths: Sequence[Path], input_format: str, keys: Sequence[str], max_document_mb: int = DEFAULT_MAX_DOCUMENT_MB
) -> Iterator[tuple[list[str], int]]:
    """Yield each document's texts, one per key, and its bytes in the input, decompressed.

    Formats as in `read_batches`. Raises DataError, naming file and line, if the input is not in the format.
    """
    for batch in read_batches(paths, input_format, keys, max_document_mb=max_document_mb):
        for index in range(len(batch.records)):
            texts = batch.texts(index)
            if texts is not None:
                yield texts, batch.num_bytes(index)


def read_source(path: Path) -> str | None:
    """Read a Python source in the encoding that it declares; None if it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None


def _matching_files(name: str, suffixes: Sequence[str]) -> list[Path]:
    path = Path(name)
    if os.path.isfile(path):  # never raises, as Path.is_file does for a name that is too long
        return [path]
    candidates = path.rglob("*") if os.path.isdir(path) else map(Path, glob.glob(name, recursive=True))
    return sorted(file for file in candidates if file.is_file() and file.name.endswith(tuple(suffixes)))


def _format_of(path: Path, input_format: str) -> str:
    if input_format == "auto":
        input_format = "parquet" if path.suffix == ".parquet" else "jsonl"
    return "array" if input_format == "jsonl" and is_array(path) else input_format


def _is_verifiable(path: Path, kind: str, keys: Sequence[str]) -> bool:
    return has_checksums(path, keys) if kind == "parquet" else path.suffix != ".zst" or has_checksum(path)


def _read_records(path: Path, kind: str, keys: Sequence[str], skip: int, max_bytes: int) -> Iterator[Record]:
    if kind == "parquet":
        for row in read_rows(path, keys, skip):
            yield TooLong(max_bytes) if any(len(cell or b"") > max_bytes for cell in row) else row
        return
    with open_unpacked(path) as file:
        if kind == "array":
            records = read_entries(file, max_bytes, path)
        else:
            records = read_lines(file, max_bytes) if kind == "jsonl" else _whole(file, max_bytes)
        yield from islice(records, skip, None)


def _whole(file: BinaryIO, max_bytes: int) -> Iterator[bytes | TooLong]:
    content = bytearray()
    while len(content) <= max_bytes and (block := file.read(BYTES_PER_READ)):  # allocates no more than that
        content += block
    yield bytes(content) if len(content) <= max_bytes else TooLong(max_bytes)


def _grouped(records: Iterator[Record]) -> Iterator[tuple[list[Record], bool]]:
    """Cut records into batches of about BYTES_PER_BATCH; the last one is marked and may be empty."""
    group: list[Record] = []
    num_bytes = 0
    for record in records:
        group.append(record)
        num_bytes += _num_bytes(record)
        if num_bytes >= BYTES_PER_BATCH or len(group) >= RECORDS_PER_BATCH:
            yield group, False
            group, num_bytes = [], 0
    yield group, True


def _num_bytes(record: Record) -> int:
    return sum(len(cell or b"") for cell in record) if isinstance(record, tuple) else len(record)


def _texts_of_line(line: bytes, keys: Sequence[str], where: str) -> list[str]:
    try:
        document = parse_json(_decode(line, where))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}); every record must be one JSON object; {BAD_RECORD_ADVICE}."
        ) from error
    if not isinstance(document, dict):
        raise DataError(f"{where}: a JSON {type(document).__name__}; every record must be an object with texts.")
    texts = [document.get(key) for key in keys]
    for key, text in zip(keys, texts, strict=True):
        if not isinstance(text, str):
            found = ", ".join(document) or "none"
            raise DataError(f"{where}: no text under the key {key!r}; keys found: {found}; name one by --json-keys.")
    return [text for text in texts if isinstance(text, str)]


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); convert it, for example with iconv.") from error
