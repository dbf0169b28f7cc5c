"""Rotary position embedding (RoPE, arXiv 2104.09864), first and second half of the rotated dimensions paired.

    angle[s, d] = position[s] * theta^(-2d / rotary_size)      d < rotary_size / 2
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

It is token-wise: cos and sin are computed from the position ids of the given tokens, without a table that grows with
the context. Angles are computed in fp64: at two million tokens an fp32 product of position and frequency is off by a
tenth of a radian.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.ops.fused import fused


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotation angles for the first `rotary_size` dimensions of every head; the others are not rotated."""

    rotary_size: int
    theta: float

    @property
    def attention_factor(self) -> float:
        """Factor of cos and sin."""
        return 1.0

    def frequencies(self, device: torch.device) -> Tensor:
        """Return the radians per token of each pair, [rotary_size/2], fp64."""
        return unscaled_frequencies(self.rotary_size, self.theta, device)

    def cos_sin(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cos and sin, each [S, B, 1, rotary_size/2], fp32 (fp64 for fp64), on the positions' device."""
        angles = positions_BS.T[..., None, None] * _frequencies(self, positions_BS.device)
        dtype, factor = torch.promote_types(dtype, torch.float32), self.attention_factor
        cos, sin = (torch.empty_like(angles, dtype=dtype) for _ in range(2))
        if factor != 1:
            return torch.mul(angles.cos(), factor, out=cos), torch.mul(angles.sin(), factor, out=sin)
        return torch.cos(angles, out=cos), torch.sin(angles, out=sin)  # computed in fp64, rounded as it is written


@functools.cache
def _frequencies(rotary: RotaryEmbedding, device: torch.device) -> Tensor:
    """Return the frequencies of `rotary`, computed once: on a GPU they take several kernels."""
    return rotary.frequencies(device)


def unscaled_frequencies(rotary_size: int, theta: float, device: torch.device) -> Tensor:
    """Compute theta^(-2d / rotary_size) for d below rotary_size / 2, fp64."""
    exponents = torch.arange(0, rotary_size, 2, dtype=torch.float64, device=device)
    return theta ** (-exponents / rotary_size)


def rotate(x_SBHD: Tensor, cos_SB1d: Tensor, sin_SB1d: Tensor) -> Tensor:
    """Rotate the first 2d dimensions of [S, B, H, D]; computed in the dtype of cos and sin, returned in that of x."""
    half = cos_SB1d.shape[-1]
    first, second, rest = x_SBHD.split([half, half, x_SBHD.shape[-1] - 2 * half], -1)
    rotated = [first * cos_SB1d - second * sin_SB1d, second * cos_SB1d + first * sin_SB1d]
    return torch.cat([*(t.to(x_SBHD.dtype) for t in rotated), rest], -1)


@fused
def split_and_rotate(qkv_SBKgD: Tensor, cos_SB1d: Tensor | None, sin_SB1d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split a projection into q and packed kv, and rotate queries and keys if cos and sin are given.

    qkv [S, B, K, H/K + 2, D]: for each key/value head its queries, its key, its value. Returns q [S, B, H, D] and
    kv [S, B, 2K, D], K keys and then K values.
    """
    q, k, v = qkv_SBKgD.split([qkv_SBKgD.shape[3] - 2, 1, 1], 3)
    q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
    if cos_SB1d is not None and sin_SB1d is not None:
        q, k = rotate(q, cos_SB1d, sin_SB1d), rotate(k, cos_SB1d, sin_SB1d)
    return q, torch.cat([k, v], 2)
