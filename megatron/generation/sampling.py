"""Sampling of the next token: greedy, or drawn from the distribution that top-k and top-p leave.

p = softmax(logits / temperature)
top-k    the k most likely ids
top-p    of those, the smallest set of most likely ids whose probability is at least p (nucleus, arXiv 1904.09751)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.generation.errors import GenerationError


@dataclass(frozen=True)
class Sampling:
    """Sampling options: how a token is chosen."""

    greedy: bool = False
    """Choose the most likely id, whatever the other options are."""

    temperature: float = 1.0
    """Divisor of the logits."""

    top_k: int = 0
    """Number of most likely ids to draw from; 0: all."""

    top_p: float = 1.0
    """Total probability of the ids to draw from."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise GenerationError(
                f"--temperature ({self.temperature:g}) must be above 0; for the likeliest use --greedy."
            )
        if self.top_k < 0:
            raise GenerationError(f"--top-k ({self.top_k}) must be 0 (all ids) or more; use for example --top-k 40.")
        if not 0 < self.top_p <= 1:
            raise GenerationError(
                f"--top-p ({self.top_p:g}) must be above 0 and at most 1; use for example --top-p 0.9."
            )

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Return the distribution [V] to draw from, in fp32 or fp64."""
        if self.greedy:
            return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).to(logits_V.dtype)
        sorted_V, ids_V = (logits_V / self.temperature).sort(descending=True, stable=True)
        if self.top_k:
            sorted_V[self.top_k :] = -torch.inf
        p_V = sorted_V.softmax(0)
        p_V[p_V.cumsum(0) - p_V >= self.top_p] = 0
        return torch.zeros_like(p_V).scatter_(0, ids_V, p_V / p_V.sum())

    def choose(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """Choose an id. Logits and generator are on the CPU."""
        if self.greedy:
            return int(logits_V.argmax())
        return int(torch.multinomial(self.probabilities(logits_V), 1, generator=generator))
