"""Megatron's `.idx` file: the index of the `.bin` file next to it.

All values are little-endian, without padding. A sequence is a run of tokens, a document is a run of sequences:

    magic              9 bytes           b"MMIDIDX" and two zeros
    version            uint64            1
    dtype code         uint8             DTYPE_OF_CODE
    num_sequences      uint64
    num_indices        uint64            number of documents + 1
    sizes              int32 [num_sequences]   tokens
    pointers           int64 [num_sequences]   byte offsets into the .bin
    document_indices   int64 [num_indices]     first sequence of each document, and num_sequences at the end
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
ENTRIES_PER_CHECK = 1 << 20
PREPROCESS_AGAIN = "make the dataset again with tools/preprocess_data.py, or copy both files again"

# Forks of Megatron disagree about the width of codes 6 and 7; the size of the .bin determines which one is meant.
DTYPE_OF_CODE: dict[int, tuple[type[np.generic], ...]] = {
    1: (np.uint8,),
    2: (np.int8,),
    3: (np.int16,),
    4: (np.int32,),
    5: (np.int64,),
    6: (np.float64, np.float32),
    7: (np.float32, np.float64),
    8: (np.uint16,),
    9: (np.uint32,),
    10: (np.uint64,),
}


@dataclass(frozen=True)
class Index:
    """The content of an `.idx` file; the arrays are read-only views of the mapped file."""

    dtype: np.dtype[Any]
    sizes: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]


def code_of_dtype(dtype: npt.DTypeLike) -> int:
    """Return the file's code for `dtype`; DataError if there is none."""
    wanted = np.dtype(dtype)
    for code, choices in DTYPE_OF_CODE.items():
        if wanted == np.dtype(choices[0]):
            return code
    allowed = ", ".join(np.dtype(choices[0]).name for choices in DTYPE_OF_CODE.values())
    raise DataError(f"tokens of type {wanted.name} cannot be stored; use one of {allowed}.")


def write_index(
    file: BinaryIO, dtype: npt.DTypeLike, sizes: npt.NDArray[np.int32], document_indices: npt.NDArray[np.int64]
) -> None:
    """Write an `.idx` for sequences that are stored one after another in the `.bin`."""
    pointers = np.zeros(len(sizes), dtype="<i8")
    np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    file.write(HEADER.pack(MAGIC, VERSION, code_of_dtype(dtype), len(sizes), len(document_indices)))
    file.write(sizes.astype("<i4").tobytes())
    file.write(pointers.tobytes())
    file.write(document_indices.astype("<i8").tobytes())


def read_index(index_path: Path, token_path: Path) -> Index:
    """Memory-map an `.idx`; check its consistency and the size of its `.bin`.

    Reads all of the `.idx` and none of the `.bin`. Raises DataError if anything is inconsistent.
    """
    dtype_code, num_sequences = _read_header(index_path)
    content = np.asarray(np.memmap(index_path, mode="r"))
    sizes_end = HEADER.size + 4 * num_sequences
    pointers_end = sizes_end + 8 * num_sequences
    sizes = content[HEADER.size : sizes_end].view("<i4")
    pointers = content[sizes_end:pointers_end].view("<i8")
    document_indices = content[pointers_end:].view("<i8")
    _check_document_indices(index_path, document_indices, num_sequences)
    num_tokens = _check_sizes(index_path, sizes)
    dtype = _resolve_dtype(dtype_code, num_tokens, index_path, token_path)
    _check_pointers(index_path, sizes, pointers, dtype.itemsize)
    return Index(dtype, sizes, pointers, document_indices)


def _read_header(path: Path) -> tuple[int, int]:
    """Return the dtype code and the number of sequences, after checking the file's length against the header."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if not header.startswith(MAGIC[: len(header)]) or not header:
        raise DataError(
            f"{path} is not a Megatron index: it starts with {header[: len(MAGIC)]!r} and not with {MAGIC!r}; "
            "give the prefix of a dataset made by tools/preprocess_data.py."
        )
    if len(header) < HEADER.size:
        raise DataError(
            f"{path} is truncated: {num_bytes} bytes, but the header alone has {HEADER.size}; {PREPROCESS_AGAIN}."
        )
    _, version, dtype_code, num_sequences, num_indices = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path} has index version {version}; only {VERSION} can be read; {PREPROCESS_AGAIN}.")
    if dtype_code not in DTYPE_OF_CODE:
        raise DataError(
            f"{path} has dtype code {dtype_code}; allowed are {min(DTYPE_OF_CODE)} to {max(DTYPE_OF_CODE)}; "
            f"{PREPROCESS_AGAIN}."
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_indices
    if num_sequences and num_bytes == expected + num_sequences:
        raise DataError(
            f"{path} is of multimodal data, with a mode for each sequence; only text can be read; give a dataset made "
            "by tools/preprocess_data.py."
        )
    if num_bytes != expected:
        raise DataError(
            f"{path} is truncated or corrupt: {num_bytes} bytes, but its {num_sequences} sequences and "
            f"{num_indices} document indices need {expected}; {PREPROCESS_AGAIN}."
        )
    return dtype_code, num_sequences


def _check_document_indices(path: Path, document_indices: npt.NDArray[np.int64], num_sequences: int) -> None:
    if len(document_indices) == 0:
        raise DataError(f"{path} has no document indices; at least one is expected; {PREPROCESS_AGAIN}.")
    first, last = int(document_indices[0]), int(document_indices[-1])
    if first != 0 or last != num_sequences:
        raise DataError(
            f"{path} is corrupt: its document indices run from {first} to {last}, expected 0 to {num_sequences}, "
            f"the number of sequences; {PREPROCESS_AGAIN}."
        )
    for start, stop in _spans(len(document_indices), overlap=1):
        if (np.diff(document_indices[start:stop]) < 0).any():
            raise DataError(f"{path} is corrupt: its document indices go down, expected never; {PREPROCESS_AGAIN}.")


def _check_sizes(path: Path, sizes: npt.NDArray[np.int32]) -> int:
    """Return the total number of tokens."""
    for start, stop in _spans(len(sizes)):
        if (sizes[start:stop] < 0).any():
            sequence = start + int(np.argmax(sizes[start:stop] < 0))
            raise DataError(
                f"{path} is corrupt: sequence {sequence} has {sizes[sequence]} tokens, expected 0 or more; "
                f"{PREPROCESS_AGAIN}."
            )
    return int(sizes.sum(dtype=np.int64))


def _resolve_dtype(dtype_code: int, num_tokens: int, index_path: Path, token_path: Path) -> np.dtype[Any]:
    num_bytes = token_path.stat().st_size
    choices = [np.dtype(choice).newbyteorder("<") for choice in DTYPE_OF_CODE[dtype_code]]
    for dtype in choices:
        if num_tokens * dtype.itemsize == num_bytes:
            return dtype
    raise DataError(
        f"{token_path} is truncated or belongs to another dataset: {num_bytes} bytes, but {index_path.name} lists "
        f"{num_tokens} tokens of {choices[0].name}, {num_tokens * choices[0].itemsize} bytes; {PREPROCESS_AGAIN}."
    )


def _check_pointers(path: Path, sizes: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], item_bytes: int) -> None:
    end_of_last = 0
    for start, stop in _spans(len(sizes)):
        ends = end_of_last + np.cumsum(sizes[start:stop], dtype=np.int64) * item_bytes
        expected = np.concatenate(([end_of_last], ends[:-1]))
        wrong = pointers[start:stop] != expected
        if wrong.any():
            position = int(np.argmax(wrong))
            raise DataError(
                f"{path} is corrupt: sequence {start + position} starts at byte {pointers[start + position]}, "
                f"expected {expected[position]}, where the one before it ends; {PREPROCESS_AGAIN}."
            )
        end_of_last = int(ends[-1])


def _spans(length: int, overlap: int = 0) -> list[tuple[int, int]]:
    """Cut `range(length)` into spans that take little memory to check; neighbors share `overlap` elements."""
    bounds = [*range(0, length, ENTRIES_PER_CHECK), length]
    return [(start, min(stop + overlap, length)) for start, stop in pairwise(bounds)]
