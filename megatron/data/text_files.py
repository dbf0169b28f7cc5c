"""Documents from text: lines of JSON, rows of Parquet, or whole files; lines and files may be packed (.gz, .zst).

Reading is cheap and goes in order; what a record holds is looked at later, in another process where there are several.
"""

import glob
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.data.packed_files import open_unpacked
from megatron.data.parquet_files import read_rows

INPUT_FORMATS = ("auto", "jsonl", "parquet", "text")
JSON_SUFFIXES = tuple(f".{name}{packing}" for name in ("jsonl", "json") for packing in ("", ".gz", ".zst"))
SUFFIXES = {
    "auto": (*JSON_SUFFIXES, ".parquet"),
    "jsonl": JSON_SUFFIXES,
    "parquet": (".parquet",),
    "text": ("",),
}
UNITS = {"jsonl": "line", "parquet": "row", "text": "file"}
BYTES_PER_BATCH = 1 << 18
RECORDS_PER_BATCH = 1024

Record = bytes | tuple[bytes | None, ...]
"""A line or a file as it is, or the texts of a row."""


@dataclass(frozen=True)
class InputPosition:
    """A place between two records: `record` records of input number `file` lie before it, and all files before that."""

    file: int = 0
    record: int = 0


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of one file, not looked into; `end` is the place behind them."""

    path: str
    input_format: str
    keys: tuple[str, ...]
    first: int
    records: list[Record]
    end: InputPosition

    def where(self, index: int) -> str:
        """What to call record `index` of the batch."""
        if self.input_format == "text":
            return self.path
        return f"{self.path}, {UNITS[self.input_format]} {self.first + index + 1}"

    def texts(self, index: int) -> list[str] | None:
        """The texts of record `index`, one per key; None for an empty line. Raises DataError that names it."""
        record = self.records[index]
        if isinstance(record, tuple):
            return [
                _decode(self._present(cell, key, index), self.where(index))
                for key, cell in zip(self.keys, record, strict=True)
            ]
        if self.input_format == "text":
            return [_decode(record, self.where(index))]
        return _texts_of_line(record, self.keys, self.where(index)) if record.strip() else None

    def num_bytes(self, index: int) -> int:
        """Bytes of record `index` in the input, unpacked."""
        return _num_bytes(self.records[index])

    def _present(self, cell: bytes | None, key: str, index: int) -> bytes:
        if cell is None:
            raise DataError(f"{self.where(index)}: no text in the column {key!r}; {BAD_RECORD_ADVICE}.")
        return cell


BAD_RECORD_ADVICE = "repair it, or leave such records out (--skip-bad-lines of tools/preprocess_data.py)"


def find_inputs(inputs: Sequence[str], input_format: str) -> list[Path]:
    """The files that names, folders (searched to any depth) and patterns stand for, sorted within each. DataError if
    one of them stands for nothing."""
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
    paths: Sequence[Path], input_format: str, keys: Sequence[str], start: InputPosition | None = None
) -> Iterator[RecordBatch]:
    """Yield the records of all files from `start` on; every file ends with a batch, if need be an empty one.

    "jsonl": a line is a JSON object, each key one of its texts. "parquet": a row, each key a column. "text": a file is
    a document of one text, whatever the keys. "auto": Parquet by the ending .parquet, else jsonl. Raises DataError
    where a file cannot be read.
    """
    start = start or InputPosition()
    for number in range(start.file, len(paths)):
        path = paths[number]
        kind = _format_of(path, input_format)
        first = start.record if number == start.file else 0
        records = _read_records(path, kind, keys, first)
        for group, is_last in _grouped(records):
            end = InputPosition(number + 1) if is_last else InputPosition(number, first + len(group))
            yield RecordBatch(str(path), kind, tuple(keys), first, group, end)
            first += len(group)


def read_documents(paths: Sequence[Path], input_format: str, keys: Sequence[str]) -> Iterator[tuple[list[str], int]]:
    """Yield for each document its texts, one per key, and the bytes it took in the input, unpacked.

    Formats as in `read_batches`. Raises DataError, naming file and line, where the input is not that.
    """
    for batch in read_batches(paths, input_format, keys):
        for index in range(len(batch.records)):
            texts = batch.texts(index)
            if texts is not None:
                yield texts, batch.num_bytes(index)


def read_source(path: Path) -> str | None:
    """The text of a Python source in the encoding that it declares; None if it is not readable as such."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None


def _matching_files(name: str, suffixes: Sequence[str]) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    candidates = path.rglob("*") if path.is_dir() else map(Path, glob.glob(name, recursive=True))
    return sorted(file for file in candidates if file.is_file() and file.name.endswith(tuple(suffixes)))


def _format_of(path: Path, input_format: str) -> str:
    if input_format != "auto":
        return input_format
    return "parquet" if path.suffix == ".parquet" else "jsonl"


def _read_records(path: Path, kind: str, keys: Sequence[str], skip: int) -> Iterator[Record]:
    if kind == "parquet":
        yield from read_rows(path, keys, skip)
        return
    with open_unpacked(path) as file:
        yield from islice(file, skip, None) if kind == "jsonl" else islice([file.read()], skip, None)


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
    return len(record) if isinstance(record, bytes) else sum(len(cell or b"") for cell in record)


def _texts_of_line(line: bytes, keys: Sequence[str], where: str) -> list[str]:
    try:
        document = parse_json(_decode(line, where))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}); every line must be one JSON object; {BAD_RECORD_ADVICE}."
        ) from error
    if not isinstance(document, dict):
        raise DataError(f"{where}: a JSON {type(document).__name__}; every line must be an object with texts.")
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
