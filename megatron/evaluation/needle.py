"""Needle in a haystack: whether a model retrieves one statement at any depth of a context of any length.

    prompt    haystack[: p]  statement  haystack[p :]  question        p = depth x length of the haystack
    score     the answer, token by token: whether each is the most likely, and the probability of all together

The prompt is prefilled as in generation, so a context may exceed the GPU's memory. If every token of the answer is the
most likely one, greedy generation gives the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.recall import RecallVocabulary
from megatron.generation.cached_model import CachedModel


@dataclass(frozen=True)
class Needle:
    """The statement that is hidden, the question that asks for it, and the expected answer."""

    statement: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.statement) + len(self.question) + len(self.answer)


class Haystack(Protocol):
    """A source of needles and of the text that surrounds them."""

    def needle(self, random: np.random.Generator) -> Needle:
        """Draw a new needle."""
        ...

    def straw(self, random: np.random.Generator, count: int) -> list[int]:
        """Draw `count` tokens of the surrounding text, without the needle."""
        ...


@dataclass(frozen=True)
class SyntheticHaystack:
    """Noise with one pair of key and value, as in the documents of `megatron.evaluation.recall`."""

    vocabulary: RecallVocabulary

    def needle(self, random: np.random.Generator) -> Needle:
        key, value = (int(draw(random, 1)[0]) for draw in (self.vocabulary.keys, self.vocabulary.values))
        return Needle((key, value), (key,), (value,))

    def straw(self, random: np.random.Generator, count: int) -> list[int]:
        return [int(token) for token in self.vocabulary.noise(random, count)]


@dataclass(frozen=True)
class TextHaystack:
    """A text that starts at a random place and wraps around, with a sentence that assigns a number to a name."""

    text: Sequence[int]
    tokenize: Callable[[str], list[int]]
    question: str
    """The beginning of the statement, which is also the question; {key} stands for the name."""

    NAMES = ("Alma", "Bruno", "Clara", "Diego", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo")

    def __post_init__(self) -> None:
        if not self.text:
            raise EvaluationError("the haystack has no text; name a file that has some.")
        if "{key}" not in self.question:
            raise EvaluationError(f"--question ({self.question}) must hold {{key}}, which stands for the name.")

    def needle(self, random: np.random.Generator) -> Needle:
        name, number = self.NAMES[random.integers(len(self.NAMES))], random.integers(10000, 100000)
        question = tuple(self.tokenize(self.question.replace("{key}", name)))
        answer = tuple(self.tokenize(f" {number}"))
        return Needle((*question, *answer, *self.tokenize(".\n")), question, answer)

    def straw(self, random: np.random.Generator, count: int) -> list[int]:
        start = int(random.integers(len(self.text)))
        return [self.text[(start + i) % len(self.text)] for i in range(count)]


@dataclass(frozen=True)
class Cell:
    """The result of the trials at one length and depth."""

    length: int
    """Tokens of prompt and answer."""
    depth: float
    """0: the needle is at the start of the context; 1: it is right before the question."""
    accuracy: float
    """Share of trials in which greedy generation gives the answer."""
    probability: float
    """Probability of the whole answer, averaged over the trials."""


def find_needles(
    model: CachedModel, haystack: Haystack, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int
) -> list[Cell]:
    """Run `trials` trials at every length and depth, each with another needle in another haystack.

    EvaluationError if a needle does not fit into a length, GenerationError if a length exceeds the model's positions.
    """
    return [_cell(model, haystack, length, depth, trials, seed) for length in lengths for depth in depths]


def bury(haystack: Haystack, random: np.random.Generator, length: int, depth: float) -> tuple[list[int], Needle]:
    """Build a prompt with a needle in it, `length` tokens with the answer; EvaluationError if it does not fit."""
    needle = haystack.needle(random)
    if needle.num_tokens > length:
        raise EvaluationError(f"a needle takes {needle.num_tokens} tokens, and does not fit into a length of {length}.")
    straw = haystack.straw(random, length - needle.num_tokens)
    place = round(depth * len(straw))
    return [*straw[:place], *needle.statement, *straw[place:], *needle.question], needle


def score(model: CachedModel, prompt: Sequence[int], answer: Sequence[int]) -> tuple[bool, float]:
    """Return whether the most likely tokens are the answer, and the probability of the answer."""
    model.check([*prompt, *answer], 0)
    cache, first_V = model.prefill(prompt)
    logits_TV = first_V[None]
    if len(answer) > 1:
        x_T1h = model.extend([cache], torch.tensor([answer[:-1]]))
        logits_TV = torch.cat([logits_TV, model.logits(x_T1h)[:, 0]])
    tokens_T = torch.tensor(answer, device=logits_TV.device)
    log_probabilities_T = logits_TV.log_softmax(-1).gather(1, tokens_T[:, None])
    return bool((logits_TV.argmax(-1) == tokens_T).all()), float(log_probabilities_T.sum().exp())


def _cell(model: CachedModel, haystack: Haystack, length: int, depth: float, trials: int, seed: int) -> Cell:
    results = []
    for trial in range(trials):
        random = np.random.default_rng([seed, length, round(depth * 10**6), trial])
        prompt, needle = bury(haystack, random, length, depth)
        results.append(score(model, prompt, needle.answer))
    found, probabilities = zip(*results, strict=True)
    return Cell(length, depth, sum(found) / trials, sum(probabilities) / trials)
