"""Several prompts at once, gone on with until each has ended."""

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
    """What follows a prompt, `end` included where it was reached."""

    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    """Of each token among all ids, whatever it was drawn from."""
    ended: bool = False
    """Whether `end` was reached."""


@dataclass
class _Going:
    """A sequence that has not ended."""

    generated: Generated
    limit: int
    cache: KeyValueCache
    logits_V: Tensor
    generator: torch.Generator

    @property
    def goes_on(self) -> bool:
        return not self.generated.ended and len(self.generated.tokens) < self.limit

    def choose(self, sampling: Sampling, end: int | None) -> None:
        """Add the next token."""
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
    """Go on from each prompt for as many tokens as its limit says, one or more, or until `end`.

    Each prompt draws from a generator of its own, seeded by `seed` and its place, so that what follows it does not
    depend on the length of the others. GenerationError, before anything runs, for an unusable prompt.
    """
    for prompt, limit in zip(prompts, limits, strict=True):
        model.check(prompt, limit)
    going = []
    for place, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        cache, logits_V = model.prefill(prompt)
        going.append(_Going(Generated(), limit, cache, logits_V, torch.Generator().manual_seed(seed + place)))
    results = [sequence.generated for sequence in going]
    while True:
        for sequence in going:
            sequence.choose(sampling, end)
        going = [sequence for sequence in going if sequence.goes_on]
        if not going:
            return results
        tokens_B1 = torch.tensor([sequence.generated.tokens[-1:] for sequence in going])
        logits_1BV = model.logits(model.extend([sequence.cache for sequence in going], tokens_B1))
        for sequence, logits_V in zip(going, logits_1BV[0], strict=True):
            sequence.logits_V = logits_V
