"""RoPE scaling: rotary frequencies stretched for contexts longer than a model was trained at.

A pair d of dimensions rotates by f[d] = theta^(-2d / R) per token, R the rotary size. With factor s, original context
L, and the rotations r[d] = L f[d] / 2 pi that a pair makes within L:

    linear   f / s                                        position interpolation (arXiv 2306.15595)
    dynamic  theta times (s n / L - s + 1)^(R / (R - 2))  for sequences of n > L tokens
    yarn     f / s for slow pairs, f for fast ones, a mixture linear in d between (arXiv 2309.00071); cos and sin are
             multiplied by the attention factor, by default 0.1 ln s + 1
    llama3   f / s for slow pairs, f for fast ones, a mixture linear in r between (Llama 3.1)

All of it is computed in fp64, and numerically equal to Hugging Face's transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.ops.rope import RotaryEmbedding, unscaled_frequencies


@dataclass(frozen=True)
class LinearRotaryEmbedding(RotaryEmbedding):
    """Every frequency divided by `factor`."""

    factor: float

    def frequencies(self, device: torch.device) -> Tensor:
        return unscaled_frequencies(self.rotary_size, self.theta, device) / self.factor


@dataclass(frozen=True)
class DynamicRotaryEmbedding(RotaryEmbedding):
    """Frequencies of a larger theta, the larger the further `length` exceeds `original_length`; rotary_size above 2."""

    factor: float
    original_length: int
    length: int

    def frequencies(self, device: torch.device) -> Tensor:
        stretch = self.factor * max(self.length / self.original_length, 1.0) - (self.factor - 1)
        theta = self.theta * stretch ** (self.rotary_size / (self.rotary_size - 2))
        return unscaled_frequencies(self.rotary_size, theta, device)


@dataclass(frozen=True)
class YarnRotaryEmbedding(RotaryEmbedding):
    """YaRN, by the turns that a pair makes within `original_length`.

    Above `beta_fast` turns a pair keeps its frequency; below `beta_slow` turns it is divided by `factor`.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    given_attention_factor: float | None = None
    mscales: tuple[float, float] | None = None

    @property
    def attention_factor(self) -> float:
        """Return the given factor, else 0.1 m ln s + 1 with m = 1, or the ratio of this for the two `mscales`."""
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        logarithm = 0.1 * math.log(self.factor)
        over, under = self.mscales or (1.0, 0.0)
        return (over * logarithm + 1) / (under * logarithm + 1)

    def frequencies(self, device: torch.device) -> Tensor:
        first = max(math.floor(self._pair_of(self.beta_fast)), 0)
        last = min(math.ceil(self._pair_of(self.beta_slow)), self.rotary_size - 1)
        pairs = torch.arange(self.rotary_size // 2, dtype=torch.float64, device=device)
        slow = ((pairs - first) / (last - first or 1)).clamp(0, 1)
        return unscaled_frequencies(self.rotary_size, self.theta, device) * (1 - slow + slow / self.factor)

    def _pair_of(self, turns: float) -> float:
        """Return the pair, as a real number, that makes this many turns within the original length."""
        tokens_per_radian = self.original_length / (2 * math.pi * turns)
        return self.rotary_size * math.log(tokens_per_radian) / (2 * math.log(self.theta))


@dataclass(frozen=True)
class Llama3RotaryEmbedding(RotaryEmbedding):
    """Llama 3.1's scaling, by the turns that a pair makes within `original_length`.

    From `high_freq_factor` turns on a pair keeps its frequency; up to `low_freq_factor` it is divided by `factor`.
    """

    factor: float
    original_length: int
    low_freq_factor: float
    high_freq_factor: float

    def frequencies(self, device: torch.device) -> Tensor:
        frequencies = unscaled_frequencies(self.rotary_size, self.theta, device)
        turns = frequencies * (self.original_length / (2 * math.pi))
        fast = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (fast + (1 - fast) / self.factor)
