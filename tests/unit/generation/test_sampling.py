"""Distributions that tokens are drawn from, against their definition, id by id."""

import math
from collections import Counter

import pytest
import torch

from megatron.generation.errors import GenerationError
from megatron.generation.sampling import Sampling

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.1, 1.9, -0.2, 0.31], dtype=torch.float64)


def directly(temperature: float, top_k: int, top_p: float) -> list[float]:
    """By sorting and counting in plain Python."""
    weights = [math.exp(logit / temperature) for logit in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    order = order[: top_k or len(order)]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.6, 0.95, 1.0])
def test_probabilities_are_those_of_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    got = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(LOGITS)
    assert got.tolist() == pytest.approx(directly(temperature, top_k, top_p), abs=1e-12)


def test_draws_follow_the_distribution() -> None:
    sampling, generator, draws = Sampling(top_k=5, top_p=0.9), torch.Generator().manual_seed(1), 20000
    counts = Counter(sampling.choose(LOGITS, generator) for _ in range(draws))
    for token, probability in enumerate(directly(1.0, 5, 0.9)):
        error = 4 * math.sqrt(probability * (1 - probability) / draws)
        assert counts[token] / draws == pytest.approx(probability, abs=error)


def test_greedy_takes_the_most_likely_id() -> None:
    greedy = Sampling(greedy=True)
    assert greedy.choose(LOGITS, torch.Generator()) == 2
    assert greedy.probabilities(LOGITS).tolist() == [0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.0}, r"--temperature \(0\) must be above 0"),
        ({"top_k": -1}, r"--top-k \(-1\) must be 0"),
        ({"top_p": 0.0}, r"--top-p \(0\) must be above 0"),
        ({"top_p": 1.5}, r"--top-p \(1.5\) must be above 0 and at most 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Sampling(**settings)
