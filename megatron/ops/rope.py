"""Rotary position embedding (arXiv 2104.09864), first and second half of the rotated dimensions paired.

    angle[s, d] = position[s] * theta^(-2d / rotary_size)      d < rotary_size / 2
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

Token-wise, from true position ids, and computed for the tokens at hand: there is no table that grows with the
context. Angles are computed in fp64: at two million tokens an fp32 product of position and frequency is off by a
tenth of a radian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates the first `rotary_size` dimensions of every head and leaves the others as they are."""

    rotary_size: int
    theta: float

    def cos_sin(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [S, B, 1, rotary_size/2], in fp32 (fp64 for a model in fp64), where the positions are."""
        exponents = torch.arange(0, self.rotary_size, 2, dtype=torch.float64, device=positions_BS.device)
        angles = positions_BS.T.to(torch.float64)[..., None, None] * self.theta ** (-exponents / self.rotary_size)
        dtype = torch.promote_types(dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x_SBHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate [S, B, H, D]; computed in the dtype of cos and sin, returned in the dtype of x."""
        half = self.rotary_size // 2
        first, second, rest = x_SBHD.split([half, half, x_SBHD.shape[-1] - self.rotary_size], -1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*(t.to(x_SBHD.dtype) for t in rotated), rest], -1)
