"""Conversations as training samples: several per sequence, each its own document, with the loss on the answers only.

    tokens      p p a a a | p p p a a | p a a . . .      p prompt, a answer, . padding; S+1 of them
    loss mask     0 1 1 1   0 0 0 1 1   0 1 1 0 0 0      of the labels, the last S

A conversation's first token is never in the loss, as no token of its own precedes it. The packing is computed once;
every epoch draws all sequences in a different order. So sample i is a function of (files, sequence length, seed, i).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron.config import Config
from megatron.config.finetuning import LongSamples
from megatron.data.batch import Sample
from megatron.data.errors import DataError
from megatron.data.sample_order import SAMPLE_STREAM, epoch_random
from megatron.data.splits import PART_NAMES, parse_split, split_documents
from megatron.data.tokens import read_pieces
from megatron.finetuning.chat_template import find_template
from megatron.finetuning.encoding import ConversationEncoder
from megatron.finetuning.grouped_dataset import GroupedDataset, bucket_lengths
from megatron.finetuning.packing import pack
from megatron.finetuning.token_cache import StoredConversation, TokenCache, tokenized, tokenizer_fingerprint
from megatron.tokenizer import Tokenizer

PACKING_STREAM = SAMPLE_STREAM + 1
LOG = logging.getLogger("megatron")


class SampleSequence(Protocol):
    """A fixed number of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class PartSettings:
    """What a part of the data is built from besides its conversations: `padding` is the id that fills up a sequence.

    With `group_size`, as many samples after each other are of one length.
    """

    name: str
    num_samples: int
    padding: int
    group_size: int | None


@dataclass(frozen=True)
class Conversations:
    """The concatenated conversations of several files."""

    caches: Sequence[TokenCache]

    def __len__(self) -> int:
        return sum(map(len, self.caches))

    def __getitem__(self, index: int) -> StoredConversation:
        cache, place = self._find(index)
        return cache[place]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [num_samples]: tokens of each conversation."""
        return np.concatenate([cache.lengths for cache in self.caches])

    def where(self, index: int) -> str:
        """Return the file and line of a conversation."""
        cache, place = self._find(index)
        return cache.where(place)

    def _find(self, index: int) -> tuple[TokenCache, int]:
        for cache in self.caches:
            if index < len(cache):
                return cache, index
            index -= len(cache)
        raise IndexError(f"conversation {len(self) + index} of {len(self)}")


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """The tokens of a sequence: conversations that begin at `bounds`, and padding up to the last of `bounds`."""

    conversations: Sequence[StoredConversation]
    bounds: npt.NDArray[np.int64]
    padding: int

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, span: slice) -> npt.NDArray[Any]:
        return read_pieces(self.bounds, span, self._read_piece)

    def _read_piece(self, piece: int, start: int, stop: int) -> npt.NDArray[np.int32]:
        if piece == len(self.conversations):
            return np.full(stop - start, self.padding, np.int32)
        return self.conversations[piece].tokens(start, stop)


class PackedDataset:
    """`num_samples` sequences packed from the conversations `chosen`, for as many epochs as needed."""

    def __init__(
        self,
        conversations: Conversations,
        chosen: npt.NDArray[np.int64],
        num_samples: int,
        seq_length: int,
        seed: int,
        padding: int,
    ) -> None:
        """`padding` is the id that fills up a sequence; a conversation that is longer than a sequence is truncated."""
        self._conversations, self._num_samples = conversations, num_samples
        self._seq_length, self._seed, self._padding = seq_length, seed, padding
        lengths = np.minimum(conversations.lengths, seq_length + 1)
        self.packing = pack(lengths, epoch_random(seed, 0, PACKING_STREAM).permutation(chosen), seq_length + 1)
        self.padding_share = 1 - float(lengths[chosen].sum()) / (len(self.packing) * (seq_length + 1))
        self._order = (0, self._order_of(0))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, of seq_length + 1 tokens."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        numbers = self.packing.sequence(self._sequence(index)).tolist()
        conversations = [self._conversations[number] for number in numbers]
        bounds = np.append(0, np.cumsum([len(conversation) for conversation in conversations]))
        bounds = bounds.clip(max=self._seq_length + 1)
        loss_spans = [
            conversation.loss_spans(stop - start) + start
            for conversation, (start, stop) in zip(conversations, pairwise(bounds.tolist()), strict=True)
        ]
        documents = pairwise(bounds.clip(max=self._seq_length).tolist())
        tokens = PackedTokens(conversations, np.append(bounds, self._seq_length + 1), self._padding)
        return Sample(tokens, np.concatenate(loss_spans), tuple(documents))

    def keep(self, num_sequences: int) -> npt.NDArray[np.int64]:
        """Keep the first sequences of an epoch only; return the conversations of the others."""
        left = self.packing.samples[self.packing.bounds[num_sequences] :]
        self.packing = self.packing.first(num_sequences)
        self._order = (0, self._order_of(0))
        return left

    def _sequence(self, index: int) -> int:
        epoch, place = divmod(index, len(self.packing))
        order = self._order
        if order[0] != epoch:
            self._order = order = (epoch, self._order_of(epoch))
        return int(order[1][place])

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        return epoch_random(self._seed, epoch, SAMPLE_STREAM).permutation(len(self.packing))


PackedDatasets = tuple[SampleSequence | None, SampleSequence | None, SampleSequence | None]


def build_packed_datasets(
    config: Config, tokenizer: Tokenizer, num_samples: tuple[int, int, int], global_batch_size: int
) -> PackedDatasets:
    """Build the training, validation and test parts: shares of --data-path, or files of their own.

    With --group-by-length, the training samples of each global batch are of one length. A part is None if no samples
    of it are requested, or if it is for evaluation and has no conversations. Raises DataError.
    """
    data, group_size = config.data, global_batch_size if config.finetuning.group_by_length else None
    encoder = ConversationEncoder(tokenizer, find_template(config.tokenizer, config.finetuning))
    if data.data_path:
        whole = _open(data.data_path, config, encoder)
        sources = [(whole, part) for part in split_documents(len(whole), parse_split(data.split))]
    else:
        given = [
            _open(paths, config, encoder) for paths in (data.train_data_path, data.valid_data_path, data.test_data_path)
        ]
        sources = [(conversations, range(len(conversations))) for conversations in given]
    train, valid, test = (
        _build_part(PartSettings(name, count, tokenizer.eod, group_size), config, conversations, part)
        for name, (conversations, part), count in zip(PART_NAMES, sources, num_samples, strict=True)
    )
    return train, valid, test


def _open(paths: Sequence[str], config: Config, encoder: ConversationEncoder) -> Conversations:
    cache_dir, fingerprint = config.data.data_cache_path, tokenizer_fingerprint(config.tokenizer)
    return Conversations(
        [
            tokenized(Path(path), Path(cache_dir or f"{Path(path)}_cache"), encoder, fingerprint, config.finetuning)
            for path in paths
        ]
    )


def _build_part(
    settings: PartSettings, config: Config, conversations: Conversations, part: range
) -> SampleSequence | None:
    name, num_samples = settings.name, settings.num_samples
    if not num_samples or (name != "train" and not part):
        return None
    length, seed = config.model.seq_length, config.training.seed
    chosen = choose(conversations, part, length, config.finetuning.long_samples, name)
    if name == "train" and settings.group_size is not None:
        buckets = _buckets(settings, config, conversations, chosen)
        return GroupedDataset(buckets, settings.group_size, num_samples, seed)
    dataset = PackedDataset(conversations, chosen, num_samples, length, seed, settings.padding)
    LOG.info(
        "%s data: %d conversations in %d sequences an epoch, %.1f %% padding",
        name, len(chosen), len(dataset.packing), 100 * dataset.padding_share,
    )  # fmt: skip
    return dataset


def _buckets(
    settings: PartSettings, config: Config, conversations: Conversations, chosen: npt.NDArray[np.int64]
) -> list[PackedDataset]:
    """Pack each conversation into sequences of the shortest length that holds it.

    Sequences beyond the last whole batch are packed again into the next length, so that none waits for later epochs.
    """
    assert settings.group_size is not None
    # An epoch may read any of its samples first.
    num_samples = settings.num_samples + len(chosen)
    seed, inputs = config.training.seed, conversations.lengths - 1
    longest, ranks = config.model.seq_length, config.parallel.ds_sequence_parallel_size
    lengths = bucket_lengths(longest, min(int(inputs[chosen].max()), longest), ranks)
    buckets, left, shorter = list[PackedDataset](), np.empty(0, np.int64), 0
    for length in lengths:
        upper = np.inf if length == lengths[-1] else length
        own = chosen[(inputs[chosen] > shorter) & (inputs[chosen] <= upper)]
        members, shorter = np.concatenate((left, own)), length
        if not len(members):
            continue
        bucket = PackedDataset(conversations, members, num_samples, length, seed, settings.padding)
        if length != lengths[-1]:
            left = bucket.keep(len(bucket.packing) // settings.group_size * settings.group_size)
        if len(bucket.packing):
            buckets.append(bucket)
            LOG.info("%s data: %d sequences of %d tokens an epoch", settings.name, len(bucket.packing), length)
    return buckets


def choose(
    conversations: Conversations, part: range, seq_length: int, long_samples: LongSamples, name: str
) -> npt.NDArray[np.int64]:
    """Choose the conversations of a part that fit into a sequence, or are truncated to fit, and have a token to learn.

    Raises DataError if none is left, or if one is too long and `long_samples` is "error"; the message names the first.
    """
    numbers = np.arange(part.start, part.stop)
    too_long = numbers[conversations.lengths[part.start : part.stop] > seq_length + 1]
    if len(too_long) and long_samples == "error":
        raise DataError(_too_long_message(conversations, too_long, seq_length))
    dropped = too_long
    if long_samples == "truncate":
        dropped = np.array([i for i in too_long.tolist() if not len(conversations[i].loss_spans(seq_length + 1))])
    if len(too_long):
        LOG.info(
            "%s data: %d of %d conversations are longer than --seq-length (%d): %d cut, %d left out",
            name, len(too_long), len(numbers), seq_length, len(too_long) - len(dropped), len(dropped),
        )  # fmt: skip
    chosen = np.setdiff1d(numbers, dropped)
    if not len(chosen):
        raise DataError(
            f"the {name} part has no conversation that fits, of {len(numbers)}; give more data, change --split, or "
            f"raise --seq-length ({seq_length})."
        )
    return chosen


def _too_long_message(conversations: Conversations, too_long: npt.NDArray[np.int64], seq_length: int) -> str:
    first = int(too_long[0])
    others = f", and so are {len(too_long) - 1} more, up to {int(conversations.lengths[too_long].max())} tokens"
    return (
        f"{conversations.where(first)}: a conversation of {int(conversations.lengths[first])} tokens is longer than "
        f"--seq-length ({seq_length}) and one more{others if len(too_long) > 1 else ''}; raise --seq-length, or choose "
        "--long-samples truncate or skip."
    )
