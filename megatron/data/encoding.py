"""Texts to tokens in other processes, in the order of the input."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.indexed_dataset import smallest_dtype
from megatron.tokenizer import Tokenizer, build_tokenizer

DOCUMENTS_PER_BATCH = 32
BATCHES_PER_WORKER = 4

EncodedDocument = tuple[list[npt.NDArray[Any]], int]
"""The tokens of each text of a document, and the bytes the document took in the input."""


@dataclass(frozen=True)
class Encoder:
    """Texts to arrays of tokens in the dtype of the dataset; `append_eod` ends every text that has any tokens."""

    tokenizer: Tokenizer
    append_eod: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which tokens are stored."""
        return smallest_dtype(self.tokenizer.vocab_size)

    def encode(self, document: tuple[list[str], int]) -> EncodedDocument:
        """Encode the texts of one document of `read_documents`."""
        texts, num_bytes = document
        return [self._tokens(text) for text in texts], num_bytes

    def _tokens(self, text: str) -> npt.NDArray[Any]:
        ids = self.tokenizer.tokenize(text)
        if ids and self.append_eod:
            ids.append(self.tokenizer.eod)
        return np.array(ids, dtype=self.dtype)


@dataclass(frozen=True)
class EncoderPlan:
    """What an encoder is made from, cheap to send to another process; fields as in `build_tokenizer`."""

    tokenizer_type: str
    vocab_file: str | None
    merge_file: str | None
    tokenizer_model: str | None
    vocab_size: int | None
    append_eod: bool

    def build(self) -> Encoder:
        """Make the encoder; TokenizerError if its files are not right."""
        tokenizer = build_tokenizer(
            self.tokenizer_type, self.vocab_file, self.merge_file, self.tokenizer_model, self.vocab_size
        )
        return Encoder(tokenizer, self.append_eod)


def encode_documents(
    documents: Iterable[tuple[list[str], int]], plan: EncoderPlan, num_workers: int
) -> Iterator[EncodedDocument]:
    """Encode documents in `num_workers` processes, this one if it is 1; the order of the input is kept.

    Only a few batches per worker are read ahead, however large the input. Raises DataError and TokenizerError of the
    input and the tokenizer.
    """
    if num_workers == 1:
        yield from map(_encoder_of_this_process(plan).encode, documents)
        return
    source = iter(documents)
    batches = iter(lambda: list(islice(source, DOCUMENTS_PER_BATCH)), [])
    # A fork would copy the locks of the tokenizer library's threads.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[list[EncodedDocument]]] = deque()
        for batch in batches:
            pending.append(pool.submit(_encode_batch, plan, batch))
            if len(pending) > BATCHES_PER_WORKER * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _encode_batch(plan: EncoderPlan, batch: Sequence[tuple[list[str], int]]) -> list[EncodedDocument]:
    encoder = _encoder_of_this_process(plan)
    return [encoder.encode(document) for document in batch]


@cache
def _encoder_of_this_process(plan: EncoderPlan) -> Encoder:
    return plan.build()
