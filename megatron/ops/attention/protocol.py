"""The interface of an attention backend.

    S = scale q k^T  (causal: the top-left aligned lower triangle)     lse = logsumexp(S)     o = exp(S - lse) v

    q       [Sq, B, H, D]     any strides, the last dimension contiguous
    k, v    [Sk, B, K, D]     K divides H: query head h reads key/value head h // (H/K)
    o, do   [Sq, B, H, D]     the dtype of q
    lse     [B, H, Sq]        natural logarithm, fp32 (fp64 for fp64 inputs)

`backward` may be called with the `o` and `lse` of a whole row of tiles, of which (k, v) is one. The probabilities
exp(S - lse) are then those of the whole row, and the gradients of the tiles add up (FlashAttention-2, arXiv 2307.08691,
section 3). Causal tiles are square and diagonal; tiles below the diagonal are not causal.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class AttentionUnavailable(ValueError):
    """A backend cannot serve a request; the message says why, and which can."""


class AttentionBackend(Protocol):
    """A pair of pure functions, and the reason why they cannot serve, if there is one."""

    name: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Return why this backend cannot serve such tensors, or None if it can."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Compute (o, lse) of one tile."""
        ...

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (dq, dk, dv) of one tile, given the o and lse of the tile's whole row."""
        ...


@runtime_checkable
class PacksDocuments(Protocol):
    """A backend whose kernels also serve many adjacent documents in one call (varlen, cu_seqlens).

    q, o, do [T, H, D], k, v [T, K, D] and lse [H, T] hold all documents. `boundaries`, int32 [documents + 1] on the
    device, holds the start of each document and the end of the last. `longest` is the length of the longest document.
    All are causal.
    """

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute (o, lse) of all documents."""
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
        """Compute (dq, dk, dv) of all documents, given the o and lse over all their keys."""
        ...
