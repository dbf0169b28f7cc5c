"""RULER's thirteen tasks. A task builds a sample of any number of units: sentences, words or documents.

niah_single_1 to 3      one needle among repeated noise, text, text with a UUID
niah_multikey_1 to 3    one needle among 3 others in text; among nothing but others; the same with UUIDs
niah_multivalue         one key with 4 values in text
niah_multiquery         4 keys asked for at once
vt                      variables assigned one to another in a chain of 4 hops
cwe                     the 10 words that a list repeats most
fwe                     the 3 most frequent of words drawn by a zeta distribution
qa_1, qa_2              a question about one or several documents among others (SQuAD, HotpotQA)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.ruler.questions import QuestionSource, QuestionTask
from megatron.evaluation.ruler.sample import Sample
from megatron.evaluation.ruler.scoring import Metric, match_all, match_part
from megatron.evaluation.ruler.templates import Template, Templates
from megatron.evaluation.ruler.text import Kind, TextSource, scatter

QUESTION_TASKS = ("qa_1", "qa_2")

_LETTERS, _CAPITALS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Task(Protocol):
    """A kind of question about a context of any length."""

    @property
    def template(self) -> Template:
        """The wording."""

    @property
    def fewest(self) -> int:
        """Smallest number of units."""

    @property
    def most(self) -> float:
        """Number of units that there are."""

    def build(self, random: np.random.Generator, num_units: int, length: int) -> Sample:
        """Build a sample of `num_units` units, for a context of `length` tokens."""


@dataclass(frozen=True)
class NeedleTask:
    """Find the values of keys. Units are sentences."""

    text: TextSource
    templates: Templates
    haystack: Literal["noise", "text", "needles"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    fewest = 1
    most = math.inf

    @property
    def template(self) -> Template:
        one = self.num_values * self.num_queries == 1
        return self.templates.one_needle if one else self.templates.families["niah"]

    def build(self, random: np.random.Generator, num_units: int, length: int) -> Sample:
        num_distractors = num_units if self.haystack == "needles" else 0
        keys = self.text.draw_distinct(random, self.keys, self.num_keys + num_distractors)
        values = [self.text.draw_distinct(random, self.values, self.num_values) for _ in keys]
        pairs = [(key, value) for key, each in zip(keys, values, strict=True) for value in each]
        needles = [
            self.templates.needle.format(type_needle_v=self.values, key=key, value=value) for key, value in pairs
        ]
        num_hidden = self.num_keys * self.num_values
        hidden = [needles[i] for i in random.permutation(num_hidden)]
        sentences = scatter(random, self._straw(random, num_units, needles[num_hidden:]), hidden)
        queries = random.permutation(self.num_keys)[: self.num_queries]
        names = [keys[i] for i in queries]
        one = self.num_values * self.num_queries == 1
        prompt = self.template.prompt(
            type_needle_v=self.values.removesuffix("s") if one else self.values,
            context=(" " if self.haystack == "text" else "\n").join(sentences),
            query=names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}",
        )
        return Sample(prompt, tuple(value for i in queries for value in values[i]))

    def _straw(self, random: np.random.Generator, count: int, distractors: Sequence[str]) -> Sequence[str]:
        if self.haystack == "needles":
            return distractors
        return [self.templates.noise] * count if self.haystack == "noise" else self.text.passage(random, count)


@dataclass(frozen=True)
class TrackingTask:
    """Name all variables with a value, along a chain of assignments. Units are sentences of noise."""

    templates: Templates
    num_hops: int = 4

    fewest = 1
    most = math.inf

    @property
    def template(self) -> Template:
        return self.templates.families["variable_tracking"]

    def build(self, random: np.random.Generator, num_units: int, length: int) -> Sample:
        example, sample = self._chain(random, 5, 3), self._chain(random, num_units, 5)
        return Sample(f"{example.prompt} {' '.join(example.references)}\n\n{sample.prompt}", sample.references)

    def _chain(self, random: np.random.Generator, num_units: int, name_length: int) -> Sample:
        names = _distinct_codes(random, _CAPITALS, name_length, self.num_hops + 1)
        value = str(random.integers(10000, 100000))
        sources = [value, *(f"VAR {name}" for name in names)]
        assignments = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
        context = "\n".join(scatter(random, [self.templates.noise] * num_units, assignments))
        return Sample(self.template.prompt(context=context, query=value, num_v=len(names)), tuple(names))


@dataclass(frozen=True)
class CommonWordsTask:
    """Name the words that a list repeats most. Units are different words."""

    text: TextSource
    template: Template

    NUM_COMMON = 10
    fewest = NUM_COMMON + 1

    @property
    def most(self) -> float:
        return len(self.text.words)

    def build(self, random: np.random.Generator, num_units: int, length: int) -> Sample:
        short = length < 4096
        example = self._word_list(random, *((20, 3, 1) if short else (40, 10, 3)))
        sample = self._word_list(random, num_units, *((6, 1) if short else (30, 3)))
        return Sample(f"{example.prompt} {_numbered(example.references)}\n{sample.prompt}", sample.references)

    def _word_list(self, random: np.random.Generator, num_words: int, repeats: int, others: int) -> Sample:
        words = self.text.distinct_words(random, num_words)
        common = words[: self.NUM_COMMON]
        entries = common * repeats + words[self.NUM_COMMON :] * others
        context = _numbered([entries[i] for i in random.permutation(len(entries))])
        return Sample(self.template.prompt(context=context, query=""), tuple(common))


@dataclass(frozen=True)
class FrequentWordsTask:
    """Name the three most frequent coded words; the k-th occurs n / (k^2 zeta(2)) times. Units are words."""

    template: Template

    ZETA_2 = math.pi**2 / 6
    fewest = 100  # the first five counts differ
    most = math.inf

    def build(self, random: np.random.Generator, num_units: int, length: int) -> Sample:
        codes = ["...", *_distinct_codes(random, _LETTERS, 6, max(length // 50, 4))]  # the most frequent is noise
        counts = (int(num_units / (rank**2 * self.ZETA_2)) for rank in range(1, len(codes) + 1))
        words = [code for code, count in zip(codes, counts, strict=True) for _ in range(count)]
        context = " ".join(words[i] for i in random.permutation(len(words)))
        return Sample(self.template.prompt(context=context, query=""), tuple(codes[1:4]))


def ruler_tasks(text: TextSource, templates: Templates, questions: Mapping[str, QuestionSource]) -> dict[str, Task]:
    """Return the tasks by their names in RULER; `questions`: the sources of qa_1 and qa_2, where there are any."""
    needle, families = partial(NeedleTask, text, templates), templates.families
    return {
        "niah_single_1": needle("noise"),
        "niah_single_2": needle("text"),
        "niah_single_3": needle("text", values="uuids"),
        "niah_multikey_1": needle("text", num_keys=4),
        "niah_multikey_2": needle("needles"),
        "niah_multikey_3": needle("needles", keys="uuids", values="uuids"),
        "niah_multivalue": needle("text", num_values=4),
        "niah_multiquery": needle("text", num_keys=4, num_queries=4),
        "vt": TrackingTask(templates),
        "cwe": CommonWordsTask(text, families["common_words_extraction"]),
        "fwe": FrequentWordsTask(families["freq_words_extraction"]),
        **{name: QuestionTask(source, families["qa"]) for name, source in questions.items()},
    }


def chosen_tasks(tasks: Mapping[str, Task], names: Sequence[str] | None) -> dict[str, Task]:
    """Return the tasks named, or all; EvaluationError for an unknown name."""
    unknown = [name for name in names or () if name not in tasks]
    if unknown:
        raise EvaluationError(
            f"--tasks ({', '.join(unknown)}) must be of {', '.join(tasks)}; qa_1 needs --squad, and qa_2 --hotpot."
        )
    return {name: tasks[name] for name in names or tasks}


def metric_of(task: str) -> Metric:
    """Return the score of a task, given its name."""
    return match_part if task in QUESTION_TASKS else match_all


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _distinct_codes(random: np.random.Generator, letters: str, size: int, count: int) -> list[str]:
    codes: dict[str, None] = {}
    while len(codes) < count:
        codes["".join(letters[i] for i in random.integers(0, len(letters), size))] = None
    return list(codes)
