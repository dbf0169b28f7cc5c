"""The interface of an attention backend.

    S = softcap tanh(scale q k^T / softcap), masked     lse = logsumexp(S)     o = exp(S - lse) v

    mask of query i and key j, counted from the beginning of the tile:
    FULL  all        CAUSAL  j <= i, of a window j > i - window as well        UPPER  j >= i

    q       [Sq, B, H, D]     any strides, the last dimension contiguous
    k, v    [Sk, B, K, D]     K divides H: query head h reads key/value head h // (H/K)
    o, do   [Sq, B, H, D]     the dtype of q
    lse     [B, H, Sq]        natural logarithm, fp32 (fp64 for fp64 inputs)

`backward` may be called with the `o` and `lse` of a whole row of tiles, of which (k, v) is one. The probabilities
exp(S - lse) are then those of the whole row, and the gradients of the tiles add up (FlashAttention-2, arXiv 2307.08691,
section 3). A masked tile has as many queries as keys. Without a softcap, S = scale q k^T.

Where torch.are_deterministic_algorithms_enabled(), a backend that serves a deterministic request gives the same bits
for the same inputs on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron.core.documents import Mask


class AttentionUnavailable(ValueError):
    """A backend cannot serve a request; the message says why, and which can."""


NO_SOFTCAP = "it has no softcap, and the scores of the model have one"


class KernelVariant(NamedTuple):
    """How the queries of a tile attend to its keys."""

    scale: float
    """Factor of the scores."""

    mask: Mask
    softcap: float | None = None
    """Bound of the scores: softcap tanh(scale q k^T / softcap)."""

    window: int | None = None
    """Of a causal tile: a query sees only the last `window` keys up to its own, itself included."""

    @property
    def is_causal(self) -> bool:
        return self.mask is Mask.CAUSAL

    @property
    def keys_before(self) -> int | None:
        """How many keys before its own a query sees, None for all: the left side of FlashAttention's window."""
        if self.mask is Mask.UPPER:
            return 0
        return None if self.window is None else self.window - 1


@dataclass(frozen=True)
class AttentionVariant:
    """How the tokens of a layer's sequence attend: each to itself and those before it, within the limits given."""

    scale: float
    """Factor of the scores."""

    softcap: float | None = None
    """Bound of the scores: softcap tanh(scale q k^T / softcap)."""

    window: int | None = None
    """A token sees the last `window` tokens up to itself, itself included."""

    local_block: int | None = None
    """The token at p of its document sees the document's tokens from floor(p / local_block) local_block on."""

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("local_block", self.local_block)):
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) of attention must be at least 1 token, or None for no limit")

    def kernel(self, mask: Mask, window: int | None = None) -> KernelVariant:
        """Return how a part of the sequence attends to another, whose mask and window are those of both."""
        return KernelVariant(self.scale, mask, self.softcap, window)


class AttentionRequest(NamedTuple):
    """The attention that a backend is asked to serve."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    variants: tuple[AttentionVariant, ...]
    """Those of the model's layers, all of which one backend serves."""

    deterministic: bool = False
    """Whether the same inputs must give the same bits each time."""

    @property
    def has_softcap(self) -> bool:
        return any(variant.softcap is not None for variant in self.variants)

    @property
    def has_short_tiles(self) -> bool:
        """Whether windows or local blocks cut tiles into parts of any length."""
        return any(variant.window is not None or variant.local_block is not None for variant in self.variants)


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
    """A pair of pure functions for every mask, and the reason why they cannot serve a request, if there is one."""

    name: str
    has_windows: bool
    """Whether they take a window; for others it is cut (megatron.ops.attention.windows)."""

    def refusal(self, request: AttentionRequest) -> str | None:
        """Return why this backend cannot serve the request, or None if it can."""
        ...

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        """Compute o and lse of one tile."""
        ...

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (dq, dk, dv) of one tile, given the output of the tile's whole row."""
        ...


@runtime_checkable
class PacksDocuments(Protocol):
    """A backend whose kernels also serve many adjacent documents in one call (varlen, cu_seqlens).

    q, o, do [T, H, D], k, v [T, K, D] and lse [H, T] hold all documents. The variant applies within each of them.
    """

    def forward_packed(self, qkv: QKV, packed: PackedSequences, variant: KernelVariant) -> AttentionOutput:
        """Compute o and lse of all documents."""
        ...

    def backward_packed(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, packed: PackedSequences, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (dq, dk, dv) of all documents, given the output over all their keys."""
        ...
