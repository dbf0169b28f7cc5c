"""Cache of tokenized conversations: one folder per file, written atomically, memory-mapped by every rank.

    tokens.bin     int32 [num_tokens]       id for a token of an answer, -1 - id for any other token
    samples.npy    int64 [num_samples, 2]   for each sample, the end of its tokens and its line in the file
    summary.json   what was read, and what was left out and why; every run reports it

The folder's name is a hash of everything its content depends on: the content of the file, the tokenizer, the chat
template and the settings of --help's "Fine-tuning". So an edit that preserves size and time is detected, and a copy
elsewhere is recognized. The files end with their checksum. While the cache is written, only line numbers and token
counts of the file stay in memory. A conversation is one sample, or several where the template rewrites its answers.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.config import TokenizerConfig
from megatron.config.finetuning import FinetuningConfig
from megatron.core.atomic_file import flush_to_disk, publish, temporary_path
from megatron.data.checked_file import CHECKSUM_BYTES, append_checksum, is_as_written
from megatron.data.errors import DataError
from megatron.data.tokens import blocks
from megatron.finetuning.chat_formats import format_of, parse_record
from megatron.finetuning.conversation_files import RawRecord, content_files, kind_of, read_records, where
from megatron.finetuning.encoding import ConversationEncoder, EncodedConversation
from megatron.finetuning.reading_summary import ReadingSummary, SummaryCounts
from megatron.tokenizer import TokenizerError

CACHE_VERSION = 4
TOKENS, SAMPLES, SUMMARY = "tokens.bin", "samples.npy", "summary.json"
FILES = (TOKENS, SAMPLES, SUMMARY)
SECONDS_BETWEEN_LINES = 30.0
LOG = logging.getLogger("megatron")


@dataclass(frozen=True, eq=False)
class StoredConversation:
    """A conversation as stored in TOKENS, int32 [L], memory-mapped: tokens are read on demand."""

    stored: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.stored)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Return tokens [start, stop)."""
        stored = self.stored[start:stop]
        return np.where(stored < 0, -1 - stored, stored)

    def loss_spans(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """Return the spans int64 [n, 2] of the labels that are tokens of answers, in the first `num_tokens` tokens.

        Label i is token i + 1, so the first token is never a label. A long answer may be several spans, each beginning
        where the previous one ends.
        """
        labels = self.stored[1:num_tokens]
        bounds = [
            np.flatnonzero(np.diff(labels[start:stop] >= 0, prepend=False, append=False)) + start
            for start, stop in blocks([(0, len(labels))])
        ]
        return np.concatenate([np.empty(0, np.int64), *bounds]).reshape(-1, 2)


@dataclass(frozen=True)
class TokenCache:
    """The tokenized conversations of one file or folder, which may be several samples each."""

    path: Path
    """The file, or the folder of Hugging Face `datasets`."""

    tokens: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> StoredConversation:
        start = int(self.samples[index - 1, 0]) if index else 0
        return StoredConversation(self.tokens[start : int(self.samples[index, 0])])

    def where(self, index: int) -> str:
        """Return the file and the line, entry or row that a sample was read from."""
        return where(self.path, int(self.samples[index, 1]))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [num_samples]: tokens of each sample."""
        return np.diff(self.samples[:, 0], prepend=0)


def tokenizer_fingerprint(flags: TokenizerConfig) -> str:
    """Return a name that two tokenizers share only if they have the same files and settings."""
    digest = hashlib.sha256(repr((flags.tokenizer_type, flags.tiktoken_pattern, flags.vocab_size)).encode())
    for given in (flags.vocab_file, flags.merge_file, flags.tokenizer_model):
        if given is not None:
            path = Path(given)
            digest.update((path / "tokenizer.json" if path.is_dir() else path).read_bytes())
    return digest.hexdigest()


def tokenized(
    path: Path,
    cache_dir: Path,
    encoder: ConversationEncoder,
    tokenizer: str,
    finetuning: FinetuningConfig,
) -> TokenCache:
    """Load the tokenized conversations of `path` from `cache_dir`; tokenize and cache them if they are not there.

    `tokenizer` is the fingerprint of the encoder's tokenizer. Any number of processes, on machines that share the
    folder, may call this at once: one tokenizes and the others wait. Raises DataError for the file, also for a record
    that cannot be trained unless `finetuning` leaves those out, or if the folder cannot be written.
    """
    content = _content_hash(path)
    given = (finetuning.chat_format, finetuning.refused_conversations, finetuning.max_document_mb)
    settings = (CACHE_VERSION, content, tokenizer, encoder.tokenizer.eod, encoder.template.description, given)
    folder = cache_dir / f"{hashlib.sha256(repr(settings).encode()).hexdigest()[:32]}-conversations"
    try:
        if not _is_whole(folder):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_suffix(".lock"), f"another process tokenizes {path}; waiting for it"):
                if not _is_whole(folder):
                    _Writer(path, content, encoder, finetuning).write(folder)
    except OSError as error:
        raise DataError(
            f"--data-cache-path ({cache_dir}) cannot be used: {error.strerror}; give a folder that can be written."
        ) from error
    ReadingSummary.parse(path, (folder / SUMMARY).read_bytes()[:-CHECKSUM_BYTES]).log()
    samples = np.load(folder / SAMPLES, mmap_mode="r")
    tokens = np.memmap(folder / TOKENS, dtype="<i4", mode="r", shape=int(samples[-1, 0]))
    return TokenCache(path, np.asarray(tokens), np.asarray(samples))


def _is_whole(folder: Path) -> bool:
    """Return whether a cache exists and is undamaged."""
    return all(is_as_written(folder / name, _key(folder, name)) for name in FILES)


def _key(folder: Path, name: str) -> str:
    return f"{folder.name}/{name}"


def _content_hash(path: Path) -> str:
    """Hash a file, or the files of a folder, with SHA-256, at more than a gigabyte per second."""
    digest = hashlib.sha256()
    try:
        for part in content_files(path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a readable file of conversations.") from error
    return f"{kind_of(path)} {digest.hexdigest()}"


@contextmanager
def _locked(path: Path, while_waiting: str) -> Iterator[None]:
    """Let one process in at a time; the lock is released when its process ends, however that ends."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            LOG.info(while_waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Writer:
    """Writes the cache of one file."""

    path: Path
    content: str
    encoder: ConversationEncoder
    finetuning: FinetuningConfig

    def write(self, folder: Path) -> None:
        """Tokenize the file into `folder`, which appears once it is whole."""
        if folder.is_dir():
            LOG.warning("%s is cut short or was changed since it was written; rebuilding it", folder)
            shutil.rmtree(folder)
        LOG.info("tokenizing %s into %s", self.path, folder)
        temporary = temporary_path(folder)
        temporary.mkdir()
        try:
            samples, summary = self._write_tokens(temporary / TOKENS)
            if not samples:
                raise DataError(summary.nothing_left())
            if _content_hash(self.path) != self.content:
                raise DataError(f"{self.path} was changed while it was tokenized; run again once it is whole.")
            np.save(temporary / SAMPLES, np.frombuffer(samples, np.int64).reshape(-1, 2))
            (temporary / SUMMARY).write_bytes(summary.to_json())
            for name in FILES:
                append_checksum(temporary / name, _key(folder, name))
                flush_to_disk(temporary / name)
            publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_tokens(self, token_path: Path) -> tuple[array[int], ReadingSummary]:
        """Write the tokens of all samples; return, for each in turn, where its tokens end and its line."""
        samples, num_tokens, reported = array("q"), 0, time.monotonic()
        counts = SummaryCounts(self.path, kind_of(self.path))
        with token_path.open("wb") as file:
            for record in read_records(self.path, self.finetuning.max_document_mb):
                for encoded in self._encode(record, counts):
                    stored = np.where(encoded.is_answer, encoded.tokens, -1 - encoded.tokens)
                    file.write(stored.astype("<i4").tobytes())
                    num_tokens += len(encoded.tokens)
                    samples.extend((num_tokens, record.number))
                if time.monotonic() - reported > SECONDS_BETWEEN_LINES:
                    LOG.info("tokenizing %s: %d tokens", record.where, num_tokens)
                    reported = time.monotonic()
        return samples, counts.summary()

    def _encode(self, record: RawRecord, counts: SummaryCounts) -> list[EncodedConversation]:
        """Tokenize a record; none are returned if it cannot be trained and such are to be left out."""
        try:
            values = record.values()
            chat_format = self.finetuning.chat_format or format_of(values)
            encoded = self.encoder.encode(parse_record(values, chat_format))
        except (DataError, TokenizerError) as error:
            reason = str(error).removeprefix(f"{record.where}: ")
            if self.finetuning.refused_conversations == "error":
                raise DataError(f"{record.where}: {reason}") from error
            counts.leave_out(record.place, reason)
            return []
        counts.take(chat_format, encoded)
        return encoded
