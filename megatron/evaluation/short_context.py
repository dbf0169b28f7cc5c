"""Whether a model got worse at short contexts: the losses of the same documents before and after a training.

The verdict follows from the mean difference d, after - before, and its standard error e over the documents:

    no regression    d + 2 e <= tolerance
    regression       d - 2 e > tolerance
    undecided        else; more documents make e smaller
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron.evaluation.errors import EvaluationError
from megatron.generation.cached_model import CachedModel
from megatron.generation.token_scores import score_tokens

Verdict = Literal["no regression", "regression", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """Mean losses in nats per token, and the verdict."""

    before: float
    after: float
    difference: float
    standard_error: float
    tolerance: float
    num_documents: int

    @property
    def verdict(self) -> Verdict:
        if self.difference + 2 * self.standard_error <= self.tolerance:
            return "no regression"
        return "regression" if self.difference - 2 * self.standard_error > self.tolerance else "undecided"


def document_losses(model: CachedModel, documents: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean loss of each document's tokens but the first."""
    return [float(-score_tokens(model, document).log_probabilities.mean()) for document in documents]


def compare(before: Sequence[float], after: Sequence[float], tolerance: float) -> Comparison:
    """Compare the losses of the same documents; EvaluationError for fewer than two."""
    if len(before) < 2:
        raise EvaluationError(
            f"{len(before)} documents are long enough, and a comparison needs 2 or more; use a shorter --length or "
            "more documents."
        )
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return Comparison(
        before=statistics.fmean(before),
        after=statistics.fmean(after),
        difference=statistics.fmean(differences),
        standard_error=statistics.stdev(differences) / math.sqrt(len(differences)),
        tolerance=tolerance,
        num_documents=len(differences),
    )
