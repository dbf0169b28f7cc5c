"""Batched generation: several prompts are continued together until each has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.generation.cache import KeyValueCache
from megatron.generation.cached_model import CachedModel
from megatron.generation.sampling import Sampling


@dataclass
class Generated:
    """The continuation of a prompt, including `end` if it was reached."""

    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    """Log-probability of each token among all ids, for any sampling."""
    ended: bool = False
    """Whether `end` was reached."""


@dataclass
class _Active:
    """A sequence that is still being generated."""

    generated: Generated
    limit: int
    cache: KeyValueCache
    logits_V: Tensor
    generator: torch.Generator

    @property
    def is_unfinished(self) -> bool:
        return not self.generated.ended and len(self.generated.tokens) < self.limit

    def choose(self, sampling: Sampling, end: int | None) -> None:
        """Choose the next token and append it."""
        logits_V = self.logits_V.cpu()
        token = sampling.choose(logits_V, self.generator)
        self.generated.tokens.append(token)
        self.generated.log_probabilities.append(float(logits_V.log_softmax(0)[token]))
        self.generated.ended = token == end


def generate(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    end: int | None = None,
    seed: int = 1234,
) -> list[Generated]:
    """Continue each prompt by up to its limit of tokens, one or more, or until `end`.

    Each prompt has its own random generator, seeded by `seed` and its index, so its continuation does not depend on the
    length of the others. GenerationError, before anything runs, for an unusable prompt.
    """
    for prompt, limit in zip(prompts, limits, strict=True):
        model.check(prompt, limit)
    active = []
    for place, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        cache, logits_V = model.prefill(prompt)
        active.append(_Active(Generated(), limit, cache, logits_V, torch.Generator().manual_seed(seed + place)))
    results = [sequence.generated for sequence in active]
    while True:
        for sequence in active:
            sequence.choose(sampling, end)
        active = [sequence for sequence in active if sequence.is_unfinished]
        if not active:
            return results
        tokens_B1 = torch.tensor([sequence.generated.tokens[-1:] for sequence in active])
        logits_1BV = model.logits(model.extend([sequence.cache for sequence in active], tokens_B1))
        for sequence, logits_V in zip(active, logits_1BV[0], strict=True):
            sequence.logits_V = logits_V
