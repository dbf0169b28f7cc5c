"""Tokens on disk in Megatron's format: PREFIX.bin holds all tokens, PREFIX.idx the bounds of their documents."""

import os
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron.core.atomic_file import publish, temporary_path
from megatron.data.errors import DataError
from megatron.data.index_file import code_of_dtype, read_index, write_index

UINT16_VOCAB_LIMIT = 65500
MAX_SEQUENCE_TOKENS = 2**31 - 1
TOKENS_PER_COPY = 1 << 22


def index_path(prefix: str | Path) -> Path:
    """Return the path of the index of the dataset `prefix`."""
    return Path(f"{prefix}.idx")


def token_path(prefix: str | Path) -> Path:
    """Return the path of the tokens of the dataset `prefix`."""
    return Path(f"{prefix}.bin")


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype in which Megatron stores tokens of a vocabulary: uint16 if it is enough, otherwise int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


class IndexedDataset:
    """Read the tokens of PREFIX.bin through PREFIX.idx; both stay on disk and are memory-mapped.

    Opening checks everything that can be checked without reading the tokens and raises DataError.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (index_path(prefix), token_path(prefix)):
            if not os.path.isfile(path):  # never raises, as Path.is_file does for a name that is too long
                raise DataError(
                    f"{path} is missing; a dataset is PREFIX.bin and PREFIX.idx together; give the prefix without an "
                    "ending, or make the dataset with tools/preprocess_data.py."
                )
        index = read_index(index_path(prefix), token_path(prefix))
        self.dtype = index.dtype
        self.sizes = index.sizes
        self.document_indices = index.document_indices
        self._first_tokens = index.pointers // index.dtype.itemsize
        self.num_tokens = int(self.sizes.sum(dtype=np.int64))
        # An empty file cannot be mapped.
        self._tokens: npt.NDArray[Any] = (
            np.asarray(np.memmap(token_path(prefix), dtype=self.dtype, mode="r"))
            if self.num_tokens
            else np.empty(0, dtype=self.dtype)
        )

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        """Pickle the name of the dataset, not its tokens."""
        return type(self), (self.prefix,)

    @property
    def num_sequences(self) -> int:
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @cached_property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """int64 [num_documents + 1]: position of each document's first token; the number of tokens at the end."""
        return np.append(self._first_tokens, self.num_tokens)[self.document_indices]

    @cached_property
    def document_sizes(self) -> npt.NDArray[np.int64]:
        """int64 [num_documents]: tokens per document."""
        return np.diff(self.document_starts)

    def __len__(self) -> int:
        return self.num_sequences

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """View tokens [offset, offset + length) of a sequence (to its end by default), read-only, without a copy."""
        start = int(self._first_tokens[sequence])
        return self._slice("sequence", sequence, start, int(self.sizes[sequence]), offset, length)

    def get_document(self, document: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """View tokens [offset, offset + length) of a document (to its end by default), read-only, without a copy."""
        start = int(self.document_starts[document])
        return self._slice("document", document, start, int(self.document_sizes[document]), offset, length)

    def get_tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """View tokens [start, stop) of the whole file, across documents, read-only, without a copy."""
        return self._tokens[start:stop]

    def _slice(
        self, owner: str, number: int, start: int, size: int, offset: int, length: int | None
    ) -> npt.NDArray[Any]:
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens [{offset}, {stop}) of {owner} {number} of {self.prefix}, which has {size}")
        return self._tokens[start + offset : start + stop]


class IndexedDatasetWriter:
    """Write a dataset whose two files appear only when they are complete.

    A context manager: leaving the block normally commits; leaving it by an exception removes all that was written.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        code_of_dtype(dtype)
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = 0
        self._sizes = array("i")
        self._document_indices = array("q", [0])
        self._token_path = temporary_path(token_path(prefix))
        self._index_path = temporary_path(index_path(prefix))
        self._file = self._token_path.open("wb")

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    def add_sequence(self, tokens: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append a sequence to the open document; DataError if a token does not fit the dtype."""
        values = np.asarray(tokens) if len(tokens) else np.empty(0, dtype=self.dtype)
        if len(values) > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"a sequence for {self.prefix} has {len(values)} tokens; at most {MAX_SEQUENCE_TOKENS} fit; "
                "cut it into several sequences of one document."
            )
        self._check_range(values)
        self._file.write(values.astype(self.dtype).tobytes())
        self._sizes.append(len(values))
        self.num_tokens += len(values)

    def end_document(self) -> None:
        """Close the open document; the next sequence opens another."""
        self._document_indices.append(len(self._sizes))

    def add_document(self, tokens: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append a document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def require_same_dtype(self, other: IndexedDataset) -> None:
        """Raise DataError unless `other` holds tokens of this writer's dtype."""
        if other.dtype != self.dtype:
            raise DataError(
                f"{other.prefix} holds {other.dtype.name} and {self.prefix} is to hold {self.dtype.name}; only "
                "datasets of one type can be joined; make them with the same tokenizer."
            )

    def add_dataset(self, other: IndexedDataset) -> None:
        """Append all documents of another dataset, one block in memory at a time; DataError if its dtype differs."""
        self.require_same_dtype(other)
        if self._document_indices[-1] != len(self._sizes):
            self.end_document()
        for start in range(0, other.num_tokens, TOKENS_PER_COPY):
            self._file.write(other.get_tokens(start, start + TOKENS_PER_COPY).data)
        num_sequences = len(self._sizes)
        self._sizes.frombytes(np.asarray(other.sizes, dtype=np.int32).tobytes())
        self._document_indices.frombytes((other.document_indices[1:] + num_sequences).astype(np.int64).tobytes())
        self.num_tokens += other.num_tokens

    def commit(self) -> None:
        """Finish both files and rename them to their final names. Closes an open document."""
        if self._document_indices[-1] != len(self._sizes):
            self.end_document()
        self._file.close()
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else np.empty(0, dtype=np.int32)
        with self._index_path.open("wb") as file:
            write_index(file, self.dtype, sizes, np.frombuffer(self._document_indices, dtype=np.int64))
        # A new .bin must never be paired with an old .idx, so the old .idx is removed first and the new one comes last.
        index_path(self.prefix).unlink(missing_ok=True)
        publish(self._token_path, token_path(self.prefix))
        publish(self._index_path, index_path(self.prefix))

    def abort(self) -> None:
        """Remove everything written so far."""
        self._file.close()
        self._token_path.unlink(missing_ok=True)
        self._index_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abort()

    def _check_range(self, values: npt.NDArray[Any]) -> None:
        if self.dtype.kind not in "iu" or len(values) == 0:
            return
        limits = np.iinfo(self.dtype)
        for token in (int(values.min()), int(values.max())):
            if not limits.min <= token <= limits.max:
                raise DataError(
                    f"token id {token} does not fit {self.dtype.name} of {self.prefix}, which holds {limits.min} to "
                    f"{limits.max}; write the dataset with a wider type."
                )
