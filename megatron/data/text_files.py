"""Documents from text: lines of JSON, or whole files, plain or gzipped."""

import glob
import gzip
import io
import json
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.data.errors import DataError

INPUT_FORMATS = ("jsonl", "text")
SUFFIXES = {"jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"), "text": ("",)}


def find_inputs(inputs: Sequence[str], input_format: str) -> list[Path]:
    """The files that names, folders (searched to any depth) and patterns stand for, sorted within each. DataError if
    one of them stands for nothing."""
    files: list[Path] = []
    for name in inputs:
        found = _matching_files(name, SUFFIXES[input_format])
        if not found:
            raise DataError(
                f"--input ({name}) stands for no {input_format} file; give an existing file, a folder that holds some, "
                "or a quoted pattern."
            )
        files += found
    return files


def read_documents(paths: Sequence[Path], input_format: str, keys: Sequence[str]) -> Iterator[tuple[list[str], int]]:
    """Yield for each document its texts, one per key, and the bytes it took in the input, unpacked.

    "jsonl": a line is a JSON object, each key one of its texts. "text": a file is a document of one text, whatever the
    keys. Raises DataError, naming file and line, where the input is not that.
    """
    for path in paths:
        if input_format == "jsonl":
            yield from _read_json_lines(path, keys)
        else:
            content = _read_bytes(path)
            yield [_decode(content, str(path))], len(content)


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


def _read_json_lines(path: Path, keys: Sequence[str]) -> Iterator[tuple[list[str], int]]:
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _texts_of_line(line, keys, f"{path}, line {number}"), len(line)
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _texts_of_line(line: bytes, keys: Sequence[str], where: str) -> list[str]:
    try:
        document = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be one JSON object; repair the line.") from error
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


def _read_bytes(path: Path) -> bytes:
    try:
        with _open_bytes(path) as file:
            return file.read()
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _open_bytes(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read: {error}; give a whole, readable file.")
