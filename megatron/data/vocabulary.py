"""Check that the tokens of a dataset are in the vocabulary of the model.

An id outside of it would read past the embedding: an assertion deep in a GPU kernel, or a wrong row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.tokens import Tokens

SCAN_TOKENS = 16 * 2**20
BLOCK_TOKENS = 2**20


def check_tokens(tokens: npt.NDArray[Any], vocab_size: int, where: str) -> None:
    """Raise DataError, naming `where`, if a token id is negative or not below vocab_size."""
    if tokens.size == 0 or (tokens.max() < vocab_size and tokens.min() >= 0):
        return
    position = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
    raise DataError(_message(int(tokens[position]), vocab_size, where))


@dataclass(frozen=True)
class CheckedTokens:
    """Tokens of a tokenizer that has more ids than the model; DataError where one of these is read."""

    tokens: Tokens
    vocab_size: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, span: slice) -> npt.NDArray[Any]:
        read = self.tokens[span]
        check_tokens(read, self.vocab_size, "the data")
        return read


def check_vocabulary(indexed: IndexedDataset, vocab_size: int, max_tokens: int = SCAN_TOKENS) -> int:
    """Raise DataError, naming the document, if the dataset holds a token id outside the vocabulary.

    Reads all tokens if there are at most `max_tokens`, otherwise that many in blocks spread evenly from the first
    token to the last, one block in memory at a time. Returns the number of tokens read.
    """
    num_read = 0
    for start, stop in _blocks(indexed.num_tokens, max_tokens):
        tokens = indexed.get_tokens(start, stop)
        num_read += len(tokens)
        if tokens.max() < vocab_size and tokens.min() >= 0:
            continue
        position = start + int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        document = int(np.searchsorted(indexed.document_starts, position, side="right")) - 1
        token = int(indexed.get_tokens(position, position + 1)[0])
        raise DataError(_message(token, vocab_size, f"document {document} of {indexed.prefix}"))
    return num_read


def check_document_ends(indexed: IndexedDataset, end_of_document: int, num_documents: int = 64) -> None:
    """Raise DataError unless one of the first documents ends with the end-of-document id."""
    ends = indexed.document_starts[1 : num_documents + 1]
    last_tokens = [int(indexed.get_tokens(end - 1, end)[0]) for end in ends.tolist() if end]
    if last_tokens and end_of_document not in last_tokens:
        raise DataError(
            f"the documents of {indexed.prefix} do not end with the tokenizer's end-of-document id "
            f"({end_of_document}), so --reset-attention-mask, --reset-position-ids and --eod-mask-loss would do "
            "nothing; make the data with tools/preprocess_data.py --append-eod, or remove these flags."
        )


def _blocks(num_tokens: int, max_tokens: int) -> list[tuple[int, int]]:
    if num_tokens <= max_tokens:
        starts = list(range(0, num_tokens, BLOCK_TOKENS))
        return [(start, min(start + BLOCK_TOKENS, num_tokens)) for start in starts]
    block = min(BLOCK_TOKENS, max_tokens)
    num_blocks = max_tokens // block
    last_start = num_tokens - block
    return [(start, start + block) for start in (k * last_start // max(num_blocks - 1, 1) for k in range(num_blocks))]


def _message(token: int, vocab_size: int, where: str) -> str:
    return (
        f"token id {token} in {where} is outside the vocabulary, ids 0 to {vocab_size - 1}; use the tokenizer that the "
        "data was made with and a model that has its ids, or make the data again with the tokenizer of the model."
    )
