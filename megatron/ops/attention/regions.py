"""Attention of the regions that are computed of a tile, each with its own mask; the rest of the tile is not computed.

The kernel is called once for each region, or once for many adjacent causal regions if the backend supports that. Shapes
and dtypes are those of the protocol. The regions of a tile share no query and no key, so results and gradients are
written without conflicts; those that do share some are merged into the others, and the results are then in fp32 (fp64
for fp64). A query that sees no key of the tile has the output 0. Its log-sum-exp is the lowest number of the format,
which is finite, so that another can be merged into it, and has no weight against any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron.core.documents import Mask, Region, Span
from megatron.ops.attention.protocol import (
    QKV,
    AttentionBackend,
    AttentionOutput,
    AttentionVariant,
    KernelVariant,
    PackedSequences,
    PacksDocuments,
)
from megatron.ops.attention.windows import without_windows
from megatron.ops.merge import merge_

# Fewer documents are as fast one by one.
PACKED_FROM = 4

Run = list[Region]


def forward_regions(
    backend: AttentionBackend, qkv: QKV, variant: AttentionVariant, regions: Sequence[Region]
) -> AttentionOutput:
    """Compute o and lse of a tile in a sequence that attends as `variant` says."""
    if not backend.has_windows:
        regions = without_windows(regions, len(qkv.q))
    if regions and regions[0].is_whole:
        return backend.forward(qkv, variant.kernel(regions[0].mask, regions[0].window))
    q, merged = qkv.q, [region for region in regions if region.merged]
    S, B, H, _ = q.shape
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros(q.shape, dtype=sum_dtype if merged else q.dtype, device=q.device)
    lse = torch.full((B, H, S), torch.finfo(sum_dtype).min, dtype=sum_dtype, device=q.device)
    for run in _runs(backend, regions, B):
        whole, kernel = _whole(run), variant.kernel(run[0].mask, run[0].window)
        own = region_of(qkv, whole)
        if isinstance(backend, PacksDocuments) and len(run) > 1:
            own = QKV(*(t.squeeze(1) for t in own))
            part, part_lse = backend.forward_packed(own, _packed(run, q.device), kernel)
            o[whole.in_queries], lse[whole.in_lse] = part.unsqueeze(1), part_lse.unsqueeze(0)
        else:
            o[whole.in_queries], lse[whole.in_lse] = backend.forward(own, kernel)
    for region in merged:
        part, part_lse = backend.forward(region_of(qkv, region), variant.kernel(region.mask, region.window))
        merge_(o[region.in_queries], lse[region.in_lse], part, part_lse)
    return AttentionOutput(o, lse)


def backward_regions(
    backend: AttentionBackend,
    do: Tensor,
    qkv: QKV,
    output: AttentionOutput,
    variant: AttentionVariant,
    regions: Sequence[Region],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) of a tile, given the output of the tile's whole row."""
    if not backend.has_windows:
        regions = without_windows(regions, len(qkv.q))
    if regions and regions[0].is_whole:
        return backend.backward(do, qkv, output, variant.kernel(regions[0].mask, regions[0].window))
    merged = [region for region in regions if region.merged]
    dtype = torch.promote_types(do.dtype, torch.float32) if merged else do.dtype
    dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in qkv)
    for run in _runs(backend, regions, do.shape[1]):
        whole, kernel = _whole(run), variant.kernel(run[0].mask, run[0].window)
        inputs = _backward_inputs(do, qkv, output, whole)
        if isinstance(backend, PacksDocuments) and len(run) > 1:
            grads = _backward_packed(backend, *inputs, _packed(run, do.device), kernel)
        else:
            grads = backend.backward(*inputs, kernel)
        dq[whole.in_queries], dk[whole.in_keys], dv[whole.in_keys] = grads
    for region in merged:
        inputs = _backward_inputs(do, qkv, output, region)
        grads = backend.backward(*inputs, variant.kernel(region.mask, region.window))
        for total, where, part in zip((dq, dk, dv), (region.in_queries, *[region.in_keys] * 2), grads, strict=True):
            total[where].add_(part)
    return dq, dk, dv


def _backward_inputs(
    do: Tensor, qkv: QKV, output: AttentionOutput, region: Region
) -> tuple[Tensor, QKV, AttentionOutput]:
    """Return what the backward pass of a region reads."""
    queries = region.in_queries
    own_output = AttentionOutput(output.o[queries], output.lse[region.in_lse].contiguous())
    return do[queries], region_of(qkv, region), own_output


def region_of(qkv: QKV, region: Region) -> QKV:
    """Return views of the queries, keys and values of a region."""
    return QKV(qkv.q[region.in_queries], qkv.k[region.in_keys], qkv.v[region.in_keys])


def _backward_packed(
    backend: PacksDocuments,
    do: Tensor,
    qkv: QKV,
    output: AttentionOutput,
    packed: PackedSequences,
    variant: KernelVariant,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) of documents in one sequence, in the shapes of the protocol."""
    do, qkv = do.squeeze(1), QKV(*(t.squeeze(1) for t in qkv))
    output = AttentionOutput(output.o.squeeze(1), output.lse.squeeze(0))
    dq, dk, dv = (t.unsqueeze(1) for t in backend.backward_packed(do, qkv, output, packed, variant))
    return dq, dk, dv


def _runs(backend: AttentionBackend, regions: Sequence[Region], num_sequences: int) -> Iterator[Run]:
    """Yield the regions that are not merged, grouped by the kernel call that serves them."""
    for run in _adjacent([region for region in regions if not region.merged]):
        is_one_sequence = len(range(num_sequences)[slice(*run[0].sequences)]) == 1
        is_packed = run[0].mask is Mask.CAUSAL and len(run) >= PACKED_FROM and is_one_sequence
        if is_packed and isinstance(backend, PacksDocuments):
            yield run
        else:
            yield from ([region] for region in run)


def _adjacent(regions: Sequence[Region]) -> list[Run]:
    """Return the regions, adjacent regions of the same sequence grouped."""
    runs: list[Run] = []
    for region in regions:
        last = runs[-1][-1] if runs else None
        if last and _end(last) == _start(region) and _kind(last) == _kind(region):
            runs[-1].append(region)
        else:
            runs.append([region])
    return runs


def _kind(region: Region) -> tuple[Span, Mask, int | None]:
    return region.sequences, region.mask, region.window


def _start(region: Region) -> tuple[int, int]:
    return region.queries[0], region.keys[0]


def _end(region: Region) -> tuple[int, int]:
    return region.queries[1], region.keys[1]


def _whole(run: Run) -> Region:
    """Return the region that spans the first to the last region of the run."""
    first, last = run[0], run[-1]
    return Region(first.sequences, (first.queries[0], last.queries[1]), (first.keys[0], last.keys[1]))


def _packed(run: Run, device: torch.device) -> PackedSequences:
    """Return where the documents of a run are, counted from its beginning."""
    origin = run[0].queries[0]
    cu_seqlens = torch.tensor([0, *(region.queries[1] - origin for region in run)], dtype=torch.int32)
    if device.type == "cuda":
        cu_seqlens = cu_seqlens.pin_memory()
    longest = max(region.queries[1] - region.queries[0] for region in run)
    return PackedSequences(cu_seqlens.to(device, non_blocking=True), longest)
