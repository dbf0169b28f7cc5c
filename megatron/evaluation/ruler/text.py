"""Sentences and words of a local text, from which the tasks are built."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron.evaluation.errors import EvaluationError

# Enough that keys and list entries differ.
FEWEST_WORDS = 200

Kind = Literal["words", "numbers", "uuids"]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\b[^\W\d_]{4,12}\b")


@dataclass(frozen=True)
class TextSource:
    """A text's sentences in order, and its distinct words."""

    sentences: Sequence[str]
    words: Sequence[str]

    @classmethod
    def of(cls, text: str) -> TextSource:
        """Split a text; EvaluationError if it has too few words."""
        text = " ".join(text.split())
        words = sorted({word.lower() for word in _WORD.findall(text)})
        if len(words) < FEWEST_WORDS:
            raise EvaluationError(
                f"--text has {len(words)} different words of 4 to 12 letters, and the tasks need {FEWEST_WORDS} or "
                "more; give a longer text."
            )
        return cls(_SENTENCE_END.split(text), words)

    def passage(self, random: np.random.Generator, count: int) -> list[str]:
        """Return `count` sentences in a row from a random place, from the beginning again after the end."""
        start = int(random.integers(len(self.sentences)))
        return [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]

    def distinct_words(self, random: np.random.Generator, count: int) -> list[str]:
        """Draw different words."""
        return [self.words[i] for i in random.permutation(len(self.words))[:count]]

    def draw(self, random: np.random.Generator, kind: Kind) -> str:
        """Draw a key or a value: two words, a number of seven digits, or a UUID."""
        if kind == "words":
            return "-".join(self.distinct_words(random, 2))
        if kind == "numbers":
            return str(random.integers(10**6, 10**7))
        return str(uuid.UUID(bytes=random.bytes(16), version=4))

    def draw_distinct(self, random: np.random.Generator, kind: Kind, count: int) -> list[str]:
        """Draw different keys or values."""
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            drawn[self.draw(random, kind)] = None
        return list(drawn)


def scatter(random: np.random.Generator, sentences: Sequence[str], hidden: Sequence[str]) -> list[str]:
    """Insert the hidden sentences at random places, in their order."""
    places = np.sort(random.integers(0, len(sentences) + 1, len(hidden)))
    merged = list(sentences)
    for number, (place, sentence) in enumerate(zip(places, hidden, strict=True)):
        merged.insert(int(place) + number, sentence)
    return merged
