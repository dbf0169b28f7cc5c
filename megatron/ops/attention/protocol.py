"""The interface of an attention backend.

    S = scale q k^T  (causal: the top-left aligned lower triangle)     lse = logsumexp(S)     o = exp(S - lse) v

    q       [Sq, B, H, D]     any strides, the last dimension contiguous
    k, v    [Sk, B, K, D]     K divides H: query head h reads key/value head h // (H/K)
    o, do   [Sq, B, H, D]     the dtype of q
    lse     [B, H, Sq]        natural logarithm, fp32 (fp64 for fp64 inputs)

`backward` may be called with the `o` and `lse` of a whole row of tiles, of which (k, v) is one. The probabilities
exp(S - lse) are then those of the whole row, and the gradients of the tiles add up (FlashAttention-2, arXiv 2307.08691,
section 3). Causal tiles are square and diagonal; tiles below the diagonal are not causal.

Where torch.are_deterministic_algorithms_enabled(), a backend that serves a deterministic request gives the same bits
for the same inputs on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class AttentionUnavailable(ValueError):
    """A backend cannot serve a request; the message says why, and which can."""


@dataclass(frozen=True)
class AttentionVariant:
    """How queries attend to keys: the scores before the softmax, and the mask.

    A layer's variant is that of the whole sequence. A tile below the diagonal has the variant `below_diagonal`.
    """

    scale: float
    """Factor of the scores."""

    causal: bool = True
    """Whether a query attends only to keys up to its own position in the tile."""

    @cached_property
    def below_diagonal(self) -> AttentionVariant:
        """The same without a mask: all keys of the tile precede its queries."""
        return replace(self, causal=False)


class AttentionRequest(NamedTuple):
    """The attention that a backend is asked to serve."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    variant: AttentionVariant
    deterministic: bool = False
    """Whether the same inputs must give the same bits each time."""


class QKV(NamedTuple):
    """Queries, keys and values of a tile."""

    q: Tensor
    k: Tensor
    v: Tensor


class AttentionOutput(NamedTuple):
    """Output and log-sum-exp of queries over a set of keys."""

    o: Tensor
    lse: Tensor


class PackedSequences(NamedTuple):
    """Where the documents are that one sequence packs."""

    cu_seqlens: Tensor
    """The start of each document and the end of the last, int32 [documents + 1] on the device."""

    max_seqlen: int
    """Length of the longest document."""


class AttentionBackend(Protocol):
    """A pair of pure functions, and the reason why they cannot serve, if there is one."""

    name: str

    def refusal(self, request: AttentionRequest) -> str | None:
        """Return why this backend cannot serve the request, or None if it can."""
        ...

    def forward(self, qkv: QKV, variant: AttentionVariant) -> AttentionOutput:
        """Compute o and lse of one tile."""
        ...

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: AttentionVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (dq, dk, dv) of one tile, given the output of the tile's whole row."""
        ...


@runtime_checkable
class PacksDocuments(Protocol):
    """A backend whose kernels also serve many adjacent documents in one call (varlen, cu_seqlens).

    q, o, do [T, H, D], k, v [T, K, D] and lse [H, T] hold all documents. The variant applies within each of them.
    """

    def forward_packed(self, qkv: QKV, packed: PackedSequences, variant: AttentionVariant) -> AttentionOutput:
        """Compute o and lse of all documents."""
        ...

    def backward_packed(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, packed: PackedSequences, variant: AttentionVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (dq, dk, dv) of all documents, given the output over all their keys."""
        ...
