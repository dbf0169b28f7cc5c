"""Ask a model the samples of every task and length, and score its answers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.ruler.sample import Sized, fill
from megatron.evaluation.ruler.scoring import clean
from megatron.evaluation.ruler.tasks import Task, metric_of
from megatron.generation.cached_model import CachedModel
from megatron.generation.generate import generate
from megatron.generation.sampling import Sampling

# A tokenizer may decode a token differently at the start of a text.
_TOKENS_BEFORE = 16


class Codec(Protocol):
    """Text to token ids and back."""

    eod: int

    def tokenize(self, text: str) -> list[int]:
        """Encode a text."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """Decode ids."""


@dataclass(frozen=True)
class Answer:
    """The model's answer to a sample."""

    prompt: str
    num_tokens: int
    """Of the prompt."""
    prediction: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class TaskResult:
    """The answers of one task at one length, and their score in percent."""

    task: str
    length: int
    score: float
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Plan:
    """What is asked: each task, `num_samples` times at each length."""

    tasks: Mapping[str, Task]
    lengths: Sequence[int]
    num_samples: int
    seed: int

    def check(self, codec: Codec) -> None:
        """Raise EvaluationError if a length is too short for a task, or a source too short for a length."""
        for length in self.lengths:
            for task in self.tasks:
                self.sample(codec, task, length, 0)

    def sample(self, codec: Codec, task: str, length: int, number: int) -> Sized:
        """Build a sample that leaves room for its answer; EvaluationError if there is none of this length."""
        source = self.tasks[task]

        def build(num_units: int) -> Sized:
            random = np.random.default_rng([self.seed, zlib.crc32(task.encode()), length, number])
            sample = source.build(random, num_units, length)
            return Sized(sample, num_units, codec.tokenize(sample.prompt))

        try:
            return fill(build, length - source.template.tokens_to_generate, source.fewest, source.most)
        except EvaluationError as error:
            raise EvaluationError(f"{task} at --lengths {length}: {error}") from error


def run_tasks(model: CachedModel, codec: Codec, plan: Plan) -> Iterator[TaskResult]:
    """Yield the result of each task and length, after all of its samples have been answered greedily."""
    for length in plan.lengths:
        for name, task in plan.tasks.items():
            answers = []
            for number in range(plan.num_samples):
                sized = plan.sample(codec, name, length, number)
                prediction = answer(model, codec, sized.tokens, task.template.tokens_to_generate)
                answers.append(Answer(sized.sample.prompt, sized.num_tokens, prediction, sized.sample.references))
            score = metric_of(name)([clean(each.prediction) for each in answers], [each.references for each in answers])
            yield TaskResult(name, length, score, tuple(answers))


def answer(model: CachedModel, codec: Codec, prompt: Sequence[int], limit: int) -> str:
    """Return the text that the model generates greedily after a prompt, up to `limit` tokens or the end of document."""
    (generated,) = generate(model, [prompt], [limit], Sampling(greedy=True), codec.eod)
    return continuation(codec, prompt, generated.tokens[:-1] if generated.ended else generated.tokens)


def continuation(codec: Codec, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Decode the tokens that follow a prompt."""
    before = list(prompt[-_TOKENS_BEFORE:])
    return codec.detokenize([*before, *tokens]).removeprefix(codec.detokenize(before))


def averages(results: Sequence[TaskResult]) -> dict[int, float]:
    """Return the mean score of all tasks, by length."""
    by_length: dict[int, list[float]] = {}
    for result in results:
        by_length.setdefault(result.length, []).append(result.score)
    return {length: round(sum(scores) / len(scores), 2) for length, scores in by_length.items()}
