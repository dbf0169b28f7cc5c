"""Tokenization in worker processes, in the order of the input."""

import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.tokenizer import TokenizerConfig
from megatron.data.errors import DataError
from megatron.data.indexed_dataset import MAX_SEQUENCE_TOKENS, smallest_dtype
from megatron.data.text_files import InputPosition, RecordBatch
from megatron.tokenizer import Tokenizer, TokenizerError, tokenizer_of

BATCHES_PER_WORKER = 4


@dataclass(frozen=True)
class EncodedBatch:
    """The tokens of a batch of records, and the position in the input after them.

    tokens: one array per key, the texts of all records concatenated. sizes: int32, tokens per text, one per document
    for each key. num_bytes: the size of the records in the input. bad_records: a message for each record left out.
    """

    tokens: list[npt.NDArray[Any]]
    sizes: list[npt.NDArray[np.int32]]
    num_bytes: int
    bad_records: list[str]
    end: InputPosition

    @property
    def num_documents(self) -> int:
        return len(self.sizes[0])


@dataclass(frozen=True)
class Encoder:
    """Encodes texts to arrays of tokens in the dataset's dtype; `append_eod` ends every text that has any tokens.

    A record that does not match its file's format is an error; with `skip_bad_records` it is left out and counted.
    """

    tokenizer: Tokenizer
    append_eod: bool
    skip_bad_records: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which tokens are stored."""
        return smallest_dtype(self.tokenizer.vocab_size)

    def encode(self, batch: RecordBatch) -> EncodedBatch:
        """Encode the records of a batch. Raises DataError and TokenizerError, naming the record."""
        num_keys = 1 if batch.input_format == "text" else len(batch.keys)
        # array("I").fromlist takes a fifth of the time of np.array(list).
        ids = [array("I") for _ in range(num_keys)]
        sizes: list[list[int]] = [[] for _ in range(num_keys)]
        num_bytes, bad_records = 0, []
        for index in range(len(batch.records)):
            num_bytes += batch.num_bytes(index)
            try:
                texts = batch.texts(index)
            except DataError as error:
                if not self.skip_bad_records:
                    raise
                bad_records.append(str(error))
                continue
            for key, text in enumerate(texts or ()):
                tokens = self._tokens(text, batch, index)
                ids[key].fromlist(tokens)
                sizes[key].append(len(tokens))
        return EncodedBatch(
            [np.asarray(each).astype(self.dtype) for each in ids],
            [np.array(each, dtype=np.int32) for each in sizes],
            num_bytes,
            bad_records,
            batch.end,
        )

    def _tokens(self, text: str, batch: RecordBatch, index: int) -> list[int]:
        try:
            ids = self.tokenizer.tokenize(text)
        except TokenizerError as error:
            raise TokenizerError(f"{batch.where(index)}: {error}") from error
        if ids and self.append_eod:
            ids.append(self.tokenizer.eod)
        if len(ids) > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"{batch.where(index)}: a document of {len(ids)} tokens; at most {MAX_SEQUENCE_TOKENS} fit; cut it."
            )
        return ids


@dataclass(frozen=True)
class EncoderPlan:
    """The settings of an `Encoder`, cheap to send to another process."""

    tokenizer: TokenizerConfig
    append_eod: bool
    skip_bad_records: bool = False

    def build(self) -> Encoder:
        """Build the encoder; TokenizerError if its files are not valid."""
        return Encoder(tokenizer_of(self.tokenizer), self.append_eod, self.skip_bad_records)


def encode_batches(batches: Iterable[RecordBatch], plan: EncoderPlan, num_workers: int) -> Iterator[EncodedBatch]:
    """Encode records in `num_workers` processes, or in this process if it is 1, in the order of the input.

    Only a few batches per worker are read ahead, however large the input. Raises DataError and TokenizerError for the
    input and the tokenizer, and DataError if a worker dies.
    """
    if num_workers == 1:
        yield from map(_encoder_of_this_process(plan).encode, batches)
        return
    # A fork would copy the locks of the tokenizer library's threads.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _end_with_parent) as pool:
        pending: deque[Future[EncodedBatch]] = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_encode_batch, plan, batch))
                if len(pending) > BATCHES_PER_WORKER * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenizes was ended from outside, most likely for lack of memory; use fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encode_batch(plan: EncoderPlan, batch: RecordBatch) -> EncodedBatch:
    return _encoder_of_this_process(plan).encode(batch)


def _end_with_parent() -> None:
    """End this worker when its parent is killed or interrupted; otherwise it would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def _encoder_of_this_process(plan: EncoderPlan) -> Encoder:
    return plan.build()
