"""Log-probability of each token of a given text, through the KV cache chunk by chunk.

T tokens scored, C of a chunk, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.generation.cache import KeyValueCache
from megatron.generation.cached_model import CachedModel

# Tokens whose logits exist at a time.
LOGITS_AT_ONCE = 1024


@dataclass(frozen=True)
class TokenScores:
    """Scores of consecutive tokens, on the CPU."""

    log_probabilities: Tensor
    """[T], fp32, or fp64 for a model in fp64."""
    is_most_likely: Tensor
    """[T], bool: whether greedy generation would give the token."""


@torch.no_grad()
def score_tokens(model: CachedModel, tokens: Sequence[int], first: int = 1) -> TokenScores:
    """Score tokens[first:], at least one token, each given all tokens before it; `first` is 1 or more.

    GenerationError for a text that is too long or has unknown ids.
    """
    assert 1 <= first < len(tokens), "the first token has no context"
    model.check(tokens, 0)
    cache = KeyValueCache(model.stream.store, len(model.model.layers))
    tokens_T = torch.tensor(tokens, dtype=torch.int64)
    scores = []
    for chunk_C in tokens_T[:-1].split(model.stream.chunk_length):
        start = cache.length
        x_C1h = model.extend([cache], chunk_C[None])
        for place in range(max(first - 1 - start, 0), len(chunk_C), LOGITS_AT_ONCE):
            x_c1h = x_C1h[place : place + LOGITS_AT_ONCE]
            targets_c = tokens_T[start + place + 1 :][: len(x_c1h)]
            scores.append(_score(model.logits(x_c1h)[:, 0], targets_c))
    log_probabilities, is_most_likely = zip(*scores, strict=True)
    return TokenScores(torch.cat(log_probabilities), torch.cat(is_most_likely))


def _score(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    targets_C = targets_C.to(logits_CV.device)
    log_probabilities_C = logits_CV.log_softmax(-1).gather(1, targets_C[:, None])[:, 0]
    return log_probabilities_C.cpu(), (logits_CV.argmax(-1) == targets_C).cpu()
