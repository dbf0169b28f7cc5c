"""Reader of records from JSON lines or from a single JSON array, as bytes, one in memory at a time.

Records are not parsed here. A record above the size limit is skipped piece by piece.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron.data.errors import DataError
from megatron.data.packed_files import open_unpacked

DEFAULT_MAX_DOCUMENT_MB, LARGEST_MAX_DOCUMENT_MB = 256, 1 << 20
MIB = 1 << 20
BYTES_PER_READ = 1 << 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
STRUCTURE, WITHIN_STRING = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')


@dataclass(frozen=True)
class TooLong:
    """Placeholder for a record of more than `max_bytes` bytes."""

    max_bytes: int

    def __len__(self) -> int:
        return self.max_bytes

    def error(self, where: str) -> DataError:
        """Return the error for the record at `where`."""
        return DataError(
            f"{where}: more than --max-document-mb ({self.max_bytes // MIB}) MiB; cut it, leave it out, or raise "
            "--max-document-mb to what memory holds several times."
        )


def bytes_of(max_document_mb: int) -> int:
    """Convert the limit on a record to bytes; DataError if it is out of range."""
    if not 1 <= max_document_mb <= LARGEST_MAX_DOCUMENT_MB:
        raise DataError(
            f"--max-document-mb ({max_document_mb}) must be 1 to {LARGEST_MAX_DOCUMENT_MB}; use for example "
            f"{DEFAULT_MAX_DOCUMENT_MB}."
        )
    return max_document_mb * MIB


def is_array(path: Path) -> bool:
    """Return whether a file begins like a JSON array. DataError if it cannot be read."""
    with open_unpacked(path) as file:
        return file.read(BYTES_PER_READ).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes | TooLong]:
    """Yield the lines of a file, each with its line end."""
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        yield TooLong(max_bytes)
        while line and not line.endswith(b"\n"):
            line = file.readline(BYTES_PER_READ)


def read_entries(file: BinaryIO, max_bytes: int, path: Path) -> Iterator[bytes | TooLong]:
    """Yield the entries of a file that is one JSON array. DataError, naming `path`, if the array is malformed."""
    for number, (entry, is_last) in enumerate(_entries(file, max_bytes, path), start=1):
        if len(entry):
            yield entry
        elif not is_last or number > 1:  # an array may be empty, an entry may not
            raise DataError(f"{path}, entry {number}: empty; put one comma between two entries and none at the end.")


def _entries(file: BinaryIO, max_bytes: int, path: Path) -> Iterator[tuple[bytes | TooLong, bool]]:
    """Yield the content between the commas of the outermost array, and whether it is the last."""
    depth, in_string, escaped = 0, False, False
    entry = _Entry(max_bytes)
    for block in iter(lambda: file.read(BYTES_PER_READ), b""):
        begin = place = 0
        while place < len(block):
            if escaped:
                place, escaped = place + 1, False
            match = (WITHIN_STRING if in_string else STRUCTURE).search(block, place)
            if match is None:
                break
            place, mark = match.end(), match[0]
            if mark == b"\\":
                escaped = True
            elif mark == b'"':
                in_string = not in_string
            elif mark in b"[{":
                depth += 1
                if depth == 1:  # the array itself; only whitespace comes before it
                    entry.take()
                    begin = place
            elif mark in b"]}" or depth == 1:
                depth -= mark != b","
                if depth == 0 or mark == b",":
                    entry.add(block[begin : place - 1])
                    yield entry.take(), depth == 0
                    begin = place
                if depth == 0:
                    _refuse_more(block[place:], file, path)
                    return
        entry.add(block[begin:])
    raise DataError(f"{path}: a truncated JSON array; give a whole file.")


class _Entry:
    """An array entry as it grows; its content is dropped once it is too long."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._content, self._num_bytes = max_bytes, bytearray(), 0

    def add(self, content: bytes) -> None:
        self._num_bytes += len(content)
        self._content += content
        if self._num_bytes > self._max_bytes:
            self._content.clear()

    def take(self) -> bytes | TooLong:
        """Return the whole entry and begin the next."""
        content, num_bytes = bytes(self._content).strip(), self._num_bytes
        self._content, self._num_bytes = bytearray(), 0
        return content if num_bytes <= self._max_bytes else TooLong(self._max_bytes)


def _refuse_more(rest: bytes, file: BinaryIO, path: Path) -> None:
    while not rest.strip():
        rest = file.read(BYTES_PER_READ)
        if not rest:
            return
    raise DataError(f"{path}: more text after the end of a JSON array; give one array, or an object on each line.")
