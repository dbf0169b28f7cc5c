"""Cache of tokenized conversations: one folder per file, written atomically, memory-mapped by every rank.

    tokens.bin     int32 [num_tokens]       id for a token of an answer, -1 - id for any other token
    samples.npy    int64 [num_samples, 2]   for each conversation, the end of its tokens and its line in the file

The folder's name is a hash of everything its content depends on: the content of the file, the tokenizer and the chat
template. So an edit that preserves size and time is detected, and a copy elsewhere is recognized. Both files end with
their checksum. While the cache is written, only line numbers and token counts of the file stay in memory.
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
from megatron.core.atomic_file import flush_to_disk, publish, temporary_path
from megatron.data.checked_file import append_checksum, is_as_written
from megatron.data.errors import DataError
from megatron.data.json_records import DEFAULT_MAX_DOCUMENT_MB
from megatron.data.tokens import blocks
from megatron.finetuning.conversations import read_conversations, where
from megatron.finetuning.encoding import ConversationEncoder
from megatron.tokenizer import TokenizerError

CACHE_VERSION = 3
TOKENS, SAMPLES = "tokens.bin", "samples.npy"
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
    """The tokenized conversations of one file."""

    path: Path
    """The file of JSON lines, or of one array."""

    tokens: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> StoredConversation:
        start = int(self.samples[index - 1, 0]) if index else 0
        return StoredConversation(self.tokens[start : int(self.samples[index, 0])])

    def where(self, index: int) -> str:
        """Return the file and the line, or entry, that a conversation was read from."""
        return where(self.path, int(self.samples[index, 1]))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [num_samples]: tokens of each conversation."""
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
    max_document_mb: int = DEFAULT_MAX_DOCUMENT_MB,
) -> TokenCache:
    """Load the tokenized conversations of `path` from `cache_dir`; tokenize and cache them if they are not there.

    `tokenizer` is the fingerprint of the encoder's tokenizer. Any number of processes, on machines that share the
    folder, may call this at once: one tokenizes and the others wait. Raises DataError for the file, also for a line or
    entry of more than `max_document_mb` MiB, or if the folder cannot be written.
    """
    content = _content_hash(path)
    settings = (CACHE_VERSION, content, tokenizer, encoder.tokenizer.eod, encoder.template.description)
    folder = cache_dir / f"{hashlib.sha256(repr(settings).encode()).hexdigest()[:32]}-conversations"
    try:
        if not _is_whole(folder):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_suffix(".lock"), f"another process tokenizes {path}; waiting for it"):
                if not _is_whole(folder):
                    _write(path, content, folder, encoder, max_document_mb)
    except OSError as error:
        raise DataError(
            f"--data-cache-path ({cache_dir}) cannot be used: {error.strerror}; give a folder that can be written."
        ) from error
    samples = np.load(folder / SAMPLES, mmap_mode="r")
    tokens = np.memmap(folder / TOKENS, dtype="<i4", mode="r", shape=int(samples[-1, 0]))
    return TokenCache(path, np.asarray(tokens), np.asarray(samples))


def _is_whole(folder: Path) -> bool:
    """Return whether a cache exists and is undamaged."""
    return all(is_as_written(folder / name, _key(folder, name)) for name in (TOKENS, SAMPLES))


def _key(folder: Path, name: str) -> str:
    return f"{folder.name}/{name}"


def _content_hash(path: Path) -> str:
    """Hash a file with SHA-256, at more than a gigabyte per second."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a readable file of conversations.") from error


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


def _write(path: Path, content: str, folder: Path, encoder: ConversationEncoder, max_document_mb: int) -> None:
    if folder.is_dir():
        LOG.warning("%s is cut short or was changed since it was written; rebuilding it", folder)
        shutil.rmtree(folder)
    LOG.info("tokenizing %s into %s", path, folder)
    temporary = temporary_path(folder)
    temporary.mkdir()
    try:
        samples = _write_tokens(path, temporary / TOKENS, encoder, max_document_mb)
        if not samples:
            raise DataError(f"{path} holds no conversation; give a file with one JSON object on each line.")
        if _content_hash(path) != content:
            raise DataError(f"{path} was changed while it was tokenized; run again once it is whole.")
        np.save(temporary / SAMPLES, np.frombuffer(samples, np.int64).reshape(-1, 2))
        for name in (TOKENS, SAMPLES):
            append_checksum(temporary / name, _key(folder, name))
            flush_to_disk(temporary / name)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(path: Path, token_path: Path, encoder: ConversationEncoder, max_document_mb: int) -> array[int]:
    """Write the tokens of all conversations; return, for each in turn, where its tokens end and its line."""
    samples, num_tokens, reported = array("q"), 0, time.monotonic()
    with token_path.open("wb") as file:
        for line, conversation in read_conversations(path, max_document_mb):
            try:
                encoded = encoder.encode(conversation)
            except (DataError, TokenizerError) as error:
                raise DataError(f"{where(path, line)}: {error}") from error
            file.write(np.where(encoded.is_answer, encoded.tokens, -1 - encoded.tokens).astype("<i4").tobytes())
            num_tokens += len(encoded.tokens)
            samples.extend((num_tokens, line))
            if time.monotonic() - reported > SECONDS_BETWEEN_LINES:
                LOG.info("tokenizing %s: line %d, %d tokens", path, line, num_tokens)
                reported = time.monotonic()
    LOG.info("tokenized %s: %d conversations, %d tokens", path, len(samples) // 2, num_tokens)
    return samples
