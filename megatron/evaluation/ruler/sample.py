"""A sample, and the search for the number of units that fills a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.evaluation.errors import EvaluationError

# Near enough to the length asked for.
FILLED = 0.99


@dataclass(frozen=True)
class Sample:
    """A prompt, and the strings that its answer should contain."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Sized:
    """A sample with its numbers of units and of tokens."""

    sample: Sample
    num_units: int
    tokens: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def fill(build: Callable[[int], Sized], budget: int, fewest: int, most: float) -> Sized:
    """Return a sample of at most `budget` tokens, and of nearly as many unless one more unit is too long.

    EvaluationError if `fewest` units are too long, or `most` too short.
    """
    low, high = build(fewest), None
    if low.num_tokens > budget:
        raise EvaluationError(f"the shortest prompt takes {low.num_tokens} tokens, and {budget} are left; use more.")
    while low.num_tokens < FILLED * budget and (high is None or high.num_units > low.num_units + 1):
        if low.num_units >= most:
            raise EvaluationError(
                f"all of the source gives a prompt of {low.num_tokens} tokens, where {budget} are to be filled; give "
                "a longer one, or use a shorter length."
            )
        trial = build(int(min(2 * low.num_units + 1, most)) if high is None else _between(low, high, budget))
        low, high = (trial, high) if trial.num_tokens <= budget else (low, trial)
    return low


def _between(low: Sized, high: Sized, budget: int) -> int:
    """Interpolate the number of units of `budget` tokens, strictly between the two."""
    share = (budget - low.num_tokens) / (high.num_tokens - low.num_tokens)
    guess = low.num_units + int(share * (high.num_units - low.num_units))
    return min(max(guess, low.num_units + 1), high.num_units - 1)
