"""RULER's scores: the references that a prediction contains, in percent, whatever their case.

all     mean over predictions of the share of references found      needles, tracking, word counts
part    share of predictions with one reference or more             question answering
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """Replace control characters by line breaks, and strip the ends."""
    return _CONTROL_CHARACTERS.sub("\n", prediction.strip()).strip()


def match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean share of references found, in percent, rounded to two places."""
    found = [_found(*pair) for pair in zip(predictions, references, strict=True)]
    return round(sum(sum(each) / len(each) for each in found) / len(predictions) * 100, 2)


def match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of predictions that contain any of their references, in percent, rounded to two places."""
    found = [_found(*pair) for pair in zip(predictions, references, strict=True)]
    return round(sum(max(each) for each in found) / len(predictions) * 100, 2)


def _found(prediction: str, references: Sequence[str]) -> list[float]:
    return [float(reference.lower() in prediction.lower()) for reference in references]
