"""What an attention backend does.

    S = scale q k^T  (causal: the top-left aligned lower triangle)     lse = logsumexp(S)     o = exp(S - lse) v

    q       [Sq, B, H, D]     any strides, the last dimension contiguous
    k, v    [Sk, B, K, D]     K divides H: query head h reads key/value head h // (H/K)
    o, do   [Sq, B, H, D]     the dtype of q
    lse     [B, H, Sq]        natural logarithm, fp32 (fp64 for fp64 inputs)

`backward` may be given the `o` and `lse` of the whole row of tiles, of which (k, v) are one: the probabilities
exp(S - lse) are then the true ones of the whole row, and the gradients of the tiles add up (FlashAttention-2, arXiv
2307.08691, section 3). Causal tiles are square and diagonal; tiles below the diagonal are not causal.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class AttentionUnavailable(ValueError):
    """A backend cannot honour a request; the message says why and what can."""


class AttentionBackend(Protocol):
    """A pair of pure functions and the reason, if any, why they cannot serve."""

    name: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Why this backend cannot serve such tensors, or None when it can."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """(o, lse) of one tile."""
        ...

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of one tile, given the o and lse of the tile's whole row."""
        ...


@runtime_checkable
class PacksDocuments(Protocol):
    """What a backend has besides, if one call of its kernels serves many documents that lie one after the other.

    q, o, do [T, H, D], k, v [T, K, D] and lse [H, T] hold them all; `boundaries` int32 [documents + 1], on the device,
    says where each begins and the last one ends, and `longest` how long the longest is. All are causal.
    """

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(o, lse) of all documents."""
        ...

    def backward_packed(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        boundaries: Tensor,
        longest: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of all documents, given the o and lse of all their keys."""
        ...
