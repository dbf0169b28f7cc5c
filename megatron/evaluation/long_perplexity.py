"""LongPPL (arXiv 2410.23771): perplexity on the key tokens, those that a long context makes predictable.

    long     log p(token | all tokens before it)
    short    log p(token | the last K to K + stride tokens before it)
    key      long - short > gain  and  long > likely
    LongPPL  exp(-mean of long over the key tokens)

The key tokens may be those that another, stronger model has found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.evaluation.errors import EvaluationError
from megatron.generation.cached_model import CachedModel
from megatron.generation.token_scores import score_tokens


@dataclass(frozen=True)
class KeyTokenRule:
    """What makes a token a key token; the defaults are the paper's."""

    short_context: int = 4096
    stride: int = 1024
    gain: float = 2.0
    likely: float = -2.0


@dataclass(frozen=True)
class LongPerplexity:
    """Perplexity of all tokens of a document, and of its key tokens."""

    digest: str
    """SHA-256 of the token ids."""
    num_tokens: int
    loss: float
    """Mean over all tokens but the first, in nats."""
    key_tokens: tuple[int, ...]
    """Places in the document."""
    key_loss: float
    """Mean over the key tokens; NaN if there are none."""


def measure_document(
    model: CachedModel, document: Sequence[int], rule: KeyTokenRule, key_tokens: Sequence[int] | None = None
) -> LongPerplexity:
    """Measure a document, on the key tokens given or on the model's own."""
    long_T = score_tokens(model, document).log_probabilities.double()
    if key_tokens is None:
        key_tokens = find_key_tokens(model, document, long_T, rule)
    key_loss = float(-long_T[torch.tensor(key_tokens) - 1].mean()) if key_tokens else math.nan
    return LongPerplexity(digest_of(document), len(document), float(-long_T.mean()), tuple(key_tokens), key_loss)


def find_key_tokens(model: CachedModel, document: Sequence[int], long_T: Tensor, rule: KeyTokenRule) -> list[int]:
    """Return the places of the key tokens. `long_T`: the log-probabilities of all tokens but the first."""
    places: list[int] = []
    for start in range(0, len(document) - rule.short_context, rule.stride):
        window = document[start : start + rule.short_context + rule.stride]
        short_C = score_tokens(model, window, rule.short_context).log_probabilities.double()
        first = start + rule.short_context
        long_C = long_T[first - 1 : first - 1 + len(short_C)]
        is_key_C = (long_C - short_C > rule.gain) & (long_C > rule.likely)
        places += [first + place for place in is_key_C.nonzero()[:, 0].tolist()]
    return places


def pooled(results: Sequence[LongPerplexity]) -> tuple[float, float, int]:
    """Return perplexity, LongPPL (NaN without key tokens) and the number of key tokens, over all documents' tokens."""
    num_scored = sum(each.num_tokens - 1 for each in results)
    num_key = sum(len(each.key_tokens) for each in results)
    loss = sum(each.loss * (each.num_tokens - 1) for each in results) / num_scored
    key_loss = sum(each.key_loss * len(each.key_tokens) for each in results if each.key_tokens)
    return math.exp(loss), math.exp(key_loss / num_key) if num_key else math.nan, num_key


def digest_of(document: Sequence[int]) -> str:
    """Return the SHA-256 of the token ids."""
    return hashlib.sha256(torch.tensor(document, dtype=torch.int64).numpy().tobytes()).hexdigest()


def key_tokens_in(content: Mapping[str, Any], document: Sequence[int]) -> list[int]:
    """Return the key tokens of a document in the JSON of another run; EvaluationError if it did not measure it."""
    for entry in content.get("documents", ()):
        if entry["digest"] == digest_of(document):
            return list(entry["key_tokens"])
    raise EvaluationError(
        f"--key-tokens has none for a document of {len(document)} tokens; write it with the same documents, --length "
        "and tokenizer."
    )
