"""Synthetic recall task: token sequences in which pairs of a key and a value recur among noise.

    ids     keys 0 .. | values .. | noise .. vocab_size - 1 | vocab_size: end of document
    noise noise KEY VALUE noise noise noise KEY VALUE noise ... KEY VALUE noise

In a document a key always has the same value, and each document draws new values. So from a key's second mention on, a
model that retrieves the first mention, however far back, can predict the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.evaluation.errors import EvaluationError

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RecallVocabulary:
    """The ids of keys, values and noise. `vocab_size` is that of NullTokenizer, which adds the end-of-document id."""

    vocab_size: int = 32
    num_keys: int = 1
    num_values: int = 16

    def __post_init__(self) -> None:
        if min(self.num_keys, self.num_values) < 1 or self.num_keys + self.num_values >= self.vocab_size:
            raise EvaluationError(
                f"{self.num_keys} keys and {self.num_values} values must be 1 or more each and leave ids for noise of "
                f"--vocab-size ({self.vocab_size}); use fewer of them, or a vocabulary of "
                f"{self.num_keys + self.num_values + 1} or more."
            )

    @property
    def end(self) -> int:
        """The id that ends a document."""
        return self.vocab_size

    def keys(self, random: np.random.Generator, count: int) -> TokenIds:
        return random.integers(0, self.num_keys, count)

    def values(self, random: np.random.Generator, count: int) -> TokenIds:
        return self.num_keys + random.integers(0, self.num_values, count)

    def noise(self, random: np.random.Generator, count: int) -> TokenIds:
        return random.integers(self.num_keys + self.num_values, self.vocab_size, count)


def recall_documents(
    vocabulary: RecallVocabulary,
    num_documents: int,
    length: int,
    max_mentions: int,
    seed: int,
    ends_every: int | None = None,
) -> Iterator[TokenIds]:
    """Yield documents of `length` tokens, the end included, with 2 to `max_mentions` mentions each.

    With `ends_every`, an end also replaces every `ends_every`-th token. It cuts a document into pieces that do not
    attend to each other if attention is reset there. EvaluationError for sizes that do not fit.
    """
    if max_mentions < 2 or 2 * max_mentions >= length:
        raise EvaluationError(
            f"{max_mentions} mentions must be 2 or more, and their pairs leave room in {length} tokens; use "
            f"{(length - 1) // 2} or fewer, or longer documents."
        )
    if ends_every is not None and ends_every < 3:
        raise EvaluationError(f"ends every {ends_every} tokens leave no room for a pair; use 3 or more.")
    random = np.random.default_rng(seed)
    for _ in range(num_documents):
        document = _document(vocabulary, random, length, int(random.integers(2, max_mentions + 1)))
        if ends_every is not None:
            document[ends_every - 1 :: ends_every] = vocabulary.end
        yield document


def _document(vocabulary: RecallVocabulary, random: np.random.Generator, length: int, mentions: int) -> TokenIds:
    values = vocabulary.values(random, vocabulary.num_keys)
    keys = vocabulary.keys(random, mentions)
    noise = vocabulary.noise(random, length - 1 - 2 * mentions)
    places = np.sort(random.integers(0, len(noise) + 1, mentions))
    pairs = np.stack([keys, values[keys]], 1).reshape(-1)
    return np.append(np.insert(noise, np.repeat(places, 2), pairs), vocabulary.end)
