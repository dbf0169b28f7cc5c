"""Question answering among documents, from SQuAD's or HotpotQA's JSON on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.ruler.sample import Sample
from megatron.evaluation.ruler.templates import Template


@dataclass(frozen=True)
class Question:
    """A question, its answers, and the numbers of the documents that answer it."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()
    """Documents of the same article, the first to surround them."""


@dataclass(frozen=True)
class QuestionSource:
    """Questions, and all documents."""

    questions: Sequence[Question]
    documents: Sequence[str]


@dataclass(frozen=True)
class QuestionTask:
    """Answer a question from documents among others. Units are other documents."""

    source: QuestionSource
    template: Template

    fewest = 0

    @property
    def most(self) -> float:
        return len(self.source.documents) - max(len(each.documents) for each in self.source.questions)

    def build(self, random: np.random.Generator, num_units: int, length: int) -> Sample:
        question = self.source.questions[int(random.integers(len(self.source.questions)))]
        others = [int(i) for i in random.permutation(len(self.source.documents)) if i not in question.documents]
        others.sort(key=lambda number: number not in question.related)
        chosen = [*question.documents, *others[:num_units]]
        texts = [self.source.documents[chosen[i]] for i in random.permutation(len(chosen))]
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1))
        return Sample(self.template.prompt(context=context, query=question.question), question.answers)


def read_squad(path: Path) -> QuestionSource:
    """Read SQuAD's JSON, without the questions that have no answer; EvaluationError if it has another form."""
    content = _read(path, "--squad", "https://rajpurkar.github.io/SQuAD-explorer")
    try:
        articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in content["data"]]
        numbers = _numbers(text for article in articles for text in article)
        questions = [
            Question(
                entry["question"],
                tuple(answer["text"] for answer in entry["answers"]),
                (numbers[paragraph["context"]],),
                tuple({numbers[text] for text in texts} - {numbers[paragraph["context"]]}),
            )
            for article, texts in zip(content["data"], articles, strict=True)
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
            if not entry.get("is_impossible", False)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(path, "--squad", error) from error
    return _checked(QuestionSource(questions, list(numbers)), path, "--squad")


def read_hotpot(path: Path) -> QuestionSource:
    """Read HotpotQA's JSON (the distractor setting); EvaluationError if it has another form."""
    content = _read(path, "--hotpot", "https://hotpotqa.github.io")
    try:
        contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in content]
        numbers = _numbers(text for context in contexts for text in context)
        questions = [
            Question(entry["question"], (entry["answer"],), tuple(dict.fromkeys(numbers[text] for text in context)))
            for entry, context in zip(content, contexts, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(path, "--hotpot", error) from error
    return _checked(QuestionSource(questions, list(numbers)), path, "--hotpot")


def _numbers(texts: Any) -> dict[str, int]:
    """Number the different texts."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _read(path: Path, flag: str, home: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{flag} ({path}) is not JSON ({error}); take the file of {home}.") from error


def _malformed(path: Path, flag: str, error: Exception) -> EvaluationError:
    return EvaluationError(f"{flag} ({path}) does not have the form of that data set ({error!r}); take its own file.")


def _checked(source: QuestionSource, path: Path, flag: str) -> QuestionSource:
    if not source.questions or not all(question.answers for question in source.questions):
        raise EvaluationError(f"{flag} ({path}) has no questions, or some without answers; take the file with answers.")
    return source
