"""Attention of the regions that documents leave of a tile: a call of the kernel for each, and nothing for the rest.

Shapes and dtypes are those of the protocol. The regions of a tile have no query and no key in common, so results and
gradients are written side by side. A query that sees no key of the tile has the output 0 and, off the diagonal, the
log-sum-exp of nothing, which is -inf; on the diagonal, where others are merged into it, 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.documents import WHOLE_TILE, Region
from megatron.ops.attention.protocol import AttentionBackend


def forward_regions(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    regions: Sequence[Region] = WHOLE_TILE,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of a tile; `causal` says that it is on the diagonal, and so are its regions."""
    if regions == WHOLE_TILE:
        return backend.forward(q, k, v, causal, scale)
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    S, B, H, _ = q.shape
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((B, H, S), 0.0 if causal else -torch.inf, dtype=sum_dtype, device=q.device)
    for region in regions:
        queries, keys = region.in_queries, region.in_keys
        o[queries], lse[region.in_lse] = backend.forward(q[queries], k[keys], v[keys], causal, scale)
    return o, lse


def backward_regions(
    backend: AttentionBackend,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    regions: Sequence[Region] = WHOLE_TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a tile, given the o and lse of the tile's whole row."""
    if regions == WHOLE_TILE:
        return backend.backward(do, q, k, v, o, lse, causal, scale)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    for region in regions:
        queries, keys, rows = region.in_queries, region.in_keys, region.in_lse
        dq[queries], dk[keys], dv[keys] = backend.backward(
            do[queries], q[queries], k[keys], v[keys], o[queries], lse[rows].contiguous(), causal, scale
        )
    return dq, dk, dv
