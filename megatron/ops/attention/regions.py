"""Attention of the regions that documents leave of a tile; the rest of the tile is not computed.

The kernel is called once for each region, or once for many adjacent documents on the diagonal if the backend supports
that. Shapes and dtypes are those of the protocol. The regions of a tile share no query and no key, so results and
gradients are written without conflicts. A query that sees no key of the tile has the output 0. Off the diagonal its
log-sum-exp is -inf, that of an empty set; on the diagonal, where others are merged into it, it is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron.core.documents import WHOLE_TILE, Region
from megatron.ops.attention.protocol import AttentionBackend, PacksDocuments

# Fewer documents are as fast one by one.
PACKED_FROM = 4

Run = list[Region]


def forward_regions(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    regions: Sequence[Region] = WHOLE_TILE,
) -> tuple[Tensor, Tensor]:
    """Compute (o, lse) of a tile; `causal` means that the tile and its regions are on the diagonal."""
    if regions == WHOLE_TILE:
        return backend.forward(q, k, v, causal, scale)
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    S, B, H, _ = q.shape
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((B, H, S), 0.0 if causal else -torch.inf, dtype=sum_dtype, device=q.device)
    for run in _runs(backend, causal, regions):
        whole = _whole(run)
        own_q, own_k, own_v = q[whole.in_queries], k[whole.in_keys], v[whole.in_keys]
        if isinstance(backend, PacksDocuments) and len(run) > 1:
            packed = own_q.squeeze(1), own_k.squeeze(1), own_v.squeeze(1)
            part, part_lse = backend.forward_packed(*packed, *_boundaries(run, q.device), scale)
            o[whole.in_queries], lse[whole.in_lse] = part.unsqueeze(1), part_lse.unsqueeze(0)
        else:
            o[whole.in_queries], lse[whole.in_lse] = backend.forward(own_q, own_k, own_v, causal, scale)
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
    """Compute (dq, dk, dv) of a tile, given the o and lse of the tile's whole row."""
    if regions == WHOLE_TILE:
        return backend.backward(do, q, k, v, o, lse, causal, scale)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    for run in _runs(backend, causal, regions):
        whole = _whole(run)
        queries, keys = whole.in_queries, whole.in_keys
        inputs = do[queries], q[queries], k[keys], v[keys], o[queries], lse[whole.in_lse].contiguous()
        if isinstance(backend, PacksDocuments) and len(run) > 1:
            grads = _backward_packed(backend, *inputs, *_boundaries(run, q.device), scale)
        else:
            grads = backend.backward(*inputs, causal, scale)
        dq[queries], dk[keys], dv[keys] = grads
    return dq, dk, dv


def _backward_packed(
    backend: PacksDocuments,
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
    """Compute (dq, dk, dv) of documents in one sequence, in the shapes of the protocol."""
    do, q, k, v, o = (t.squeeze(1) for t in (do, q, k, v, o))
    grads = backend.backward_packed(do, q, k, v, o, lse.squeeze(0), boundaries, longest, scale)
    dq, dk, dv = (t.unsqueeze(1) for t in grads)
    return dq, dk, dv


def _runs(backend: AttentionBackend, causal: bool, regions: Sequence[Region]) -> Iterator[Run]:
    """Yield the regions, grouped by the kernel call that serves them."""
    for run in _adjacent(regions):
        if causal and len(run) >= PACKED_FROM and isinstance(backend, PacksDocuments):
            yield run
        else:
            yield from ([region] for region in run)


def _adjacent(regions: Sequence[Region]) -> list[Run]:
    """Return the regions, adjacent regions of the same sequence grouped."""
    runs: list[Run] = []
    for region in regions:
        last = runs[-1][-1] if runs else None
        if last and (last.sequences, last.queries[1]) == (region.sequences, region.queries[0]):
            runs[-1].append(region)
        else:
            runs.append([region])
    return runs


def _whole(run: Run) -> Region:
    """Return the region that spans the first to the last region of the run."""
    first, last = run[0], run[-1]
    return Region(first.sequences, (first.queries[0], last.queries[1]), (first.keys[0], last.keys[1]))


def _boundaries(run: Run, device: torch.device) -> tuple[Tensor, int]:
    """Return the boundaries of the documents, int32 on the device, from 0, and the length of the longest."""
    origin = run[0].queries[0]
    boundaries = torch.tensor([0, *(region.queries[1] - origin for region in run)], dtype=torch.int32)
    if device.type == "cuda":
        boundaries = boundaries.pin_memory()
    longest = max(region.queries[1] - region.queries[0] for region in run)
    return boundaries.to(device, non_blocking=True), longest
