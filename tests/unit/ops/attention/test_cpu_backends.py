"""Backends that run on CPUs, tile by tile with the row's own output and log-sum-exp, against autograd on the whole."""

import pytest
import torch

from megatron.core.documents import Mask, Region
from megatron.ops.attention import (
    BACKENDS,
    QKV,
    AttentionOutput,
    AttentionRequest,
    AttentionVariant,
    KernelVariant,
    backward_regions,
    forward_regions,
    reference,
)
from megatron.ops.merge import merge_

CPU = torch.device("cpu")
BY_NAME = {backend.name: backend for backend in BACKENDS}
CPU_BACKENDS = pytest.mark.parametrize("backend", [BY_NAME["reference"], BY_NAME["torch-cpu"]], ids=lambda b: b.name)
#        batch, chunk lengths, query heads, key/value heads, head size
SHAPES = {
    "mha, head size 64": (1, [32, 32], 4, 4, 64),
    "gqa, head size 80": (1, [24, 24, 24], 4, 2, 80),
    "mqa, head size 96": (2, [16, 16], 4, 1, 96),
    "head size 128, batch of 3": (3, [16, 16], 2, 2, 128),
    "uneven tiles, batch of 3": (3, [32, 32, 13], 6, 2, 16),
    "one token at the end": (2, [33, 33, 1], 3, 1, 8),
    "one tile": (1, [40], 2, 1, 64),
}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


MASKS = {
    "full": Region(mask=Mask.FULL),
    "causal": Region(mask=Mask.CAUSAL),
    "upper": Region(mask=Mask.UPPER),
    "window of 1": Region(mask=Mask.CAUSAL, window=1),
    "window of 4": Region(mask=Mask.CAUSAL, window=4),
    "window of all": Region(mask=Mask.CAUSAL, window=99),
}
ALL_MASKS = pytest.mark.parametrize("region", MASKS.values(), ids=MASKS.keys())


def request_for(device, dtype, head_size, deterministic=False, **variant):
    """A request for attention of the usual scale."""
    return AttentionRequest(device, dtype, head_size, (AttentionVariant(head_size**-0.5, **variant),), deterministic)


def draw(shape, dtype=torch.float64, spread=1.0, seed=0):
    """q, k, v, do for the whole sequence, rounded to `dtype` and given in fp64."""
    B, chunks, H, K, D = shape
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(sum(chunks), B, heads, D, generator=generator, dtype=torch.float64) for heads in (H, K, K, H)
    ]
    tensors[0] *= spread
    return [t.to(dtype).double() for t in tensors]


def seen(region, num_queries, num_keys):
    """Which keys each query sees of a region, [queries, keys]."""
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool)
    mask = {Mask.FULL: everything, Mask.CAUSAL: everything.tril(), Mask.UPPER: everything.triu()}[region.mask]
    return mask if region.window is None else mask & everything.triu(1 - region.window)


def truth(q, k, v, do, scale, softcap=None, mask=None):
    """(o, lse, dq, dk, dv) of causal or otherwise masked attention over all keys, by autograd in fp64."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    copies = q.shape[2] // k.shape[2]
    scores = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(copies, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = seen(MASKS["causal"], len(q), len(k)) if mask is None else mask
    scores = scores.masked_fill(~mask.to(q.device), -torch.inf)
    o = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v.repeat_interleave(copies, 2))
    o.backward(do)
    return [o.detach(), scores.logsumexp(-1).detach(), q.grad, k.grad, v.grad]


def tiled(backend, q, k, v, do, scale, lengths):
    """The same by tiles, as the stream runs them: sums of tile gradients in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs, dos = (t.split(lengths) for t in (q, k, v, do))
    os, lses = [], []
    causal, full = (KernelVariant(scale, mask) for mask in (Mask.CAUSAL, Mask.FULL))
    dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    for i in range(len(lengths)):
        o, lse = backend.forward(QKV(qs[i], ks[i], vs[i]), causal)
        o = o.to(wide)
        for j in range(i):
            merge_(o, lse, *backend.forward(QKV(qs[i], ks[j], vs[j]), full))
        o = o.to(q.dtype)
        for j in range(i + 1):
            qkv, output = QKV(qs[i], ks[j], vs[j]), AttentionOutput(o, lse)
            grads = backend.backward(dos[i], qkv, output, causal if i == j else full)
            for total, chunk, gradient in zip((dq, dk, dv), (i, j, j), grads, strict=True):
                total.split(lengths)[chunk].add_(gradient)
        os.append(o)
        lses.append(lse)
    return [torch.cat(os), torch.cat(lses, 2), dq, dk, dv]


def row_of_two_tiles(backend, q, k, v, do, variant, region):
    """(o, lse, dq, dk, dv) of queries against as many keys with the mask of a region, and all later keys."""
    n, rest = len(q), KernelVariant(variant.scale, Mask.FULL, variant.softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    masked, full = QKV(q, k[:n], v[:n]), QKV(q, k[n:], v[n:])
    o, lse = forward_regions(backend, masked, variant, (region,))
    o = o.to(wide)
    merge_(o, lse, *backend.forward(full, rest))
    output = AttentionOutput(o.to(q.dtype), lse)
    dq, *dkv = backward_regions(backend, do, masked, output, variant, (region,))
    other_dq, *other_dkv = backend.backward(do, full, output, rest)
    dk, dv = (torch.cat(parts) for parts in zip(dkv, other_dkv, strict=True))
    return [output.o, lse, dq.to(wide) + other_dq, dk, dv]


def errors(got, want):
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


@ALL_SHAPES
@CPU_BACKENDS
@pytest.mark.parametrize("scale", ["usual", 0.3])
def test_tiles_add_up_to_attention_over_the_whole_in_fp64(backend, shape, scale):
    scale = shape[-1] ** -0.5 if scale == "usual" else scale
    tensors = draw(shape)
    assert max(errors(tiled(backend, *tensors, scale, shape[1]), truth(*tensors, scale))) < 1e-13


@ALL_SHAPES
@pytest.mark.parametrize("dtype, floor", [(torch.float32, 1e-7), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_the_torch_kernel_errs_no_more_than_the_reference_in_the_same_precision(shape, dtype, floor):
    scale = shape[-1] ** -0.5
    tensors = draw(shape, dtype)
    exact = truth(*tensors, scale)
    rounded = [t.to(dtype) for t in tensors]
    allowed, got = (
        errors(tiled(BY_NAME[name], *rounded, scale, shape[1]), exact) for name in ("reference", "torch-cpu")
    )
    for name, error, bound in zip(("o", "lse", "dq", "dk", "dv"), got, allowed, strict=True):
        assert error <= 3 * bound + floor, name


#        batch, queries, later keys, query heads, key/value heads, head size
ROWS = {
    "mha, head size 64": (1, 13, 3, 2, 2, 64),
    "gqa, head size 192, batch of 2": (2, 8, 11, 4, 2, 192),
    "mqa, head size 256, fewer keys": (1, 10, 1, 4, 1, 256),
    "one query": (2, 1, 4, 2, 1, 80),
}
ALL_ROWS = pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS.keys())


def draw_row(shape, dtype=torch.float64):
    B, num_queries, later_keys, H, K, D = shape
    q, k, v, do = draw((B, [num_queries + later_keys], H, K, D), dtype)
    return q[:num_queries], k, v, do[:num_queries]


def row_mask(region, shape):
    return torch.cat([seen(region, shape[1], shape[1]), torch.ones(shape[1], shape[2], dtype=torch.bool)], 1)


@ALL_ROWS
@ALL_MASKS
@pytest.mark.parametrize(
    "name, softcap", [("reference", None), ("reference", 0.7), ("reference", 30.0), ("torch-cpu", None)]
)
def test_a_masked_tile_of_a_row_is_the_definition_in_fp64(name, softcap, region, shape):
    tensors, scale = draw_row(shape), shape[-1] ** -0.5
    got = row_of_two_tiles(BY_NAME[name], *tensors, AttentionVariant(scale, softcap), region)
    assert max(errors(got, truth(*tensors, scale, softcap, row_mask(region, shape)))) < 1e-13


@pytest.mark.parametrize("mask", Mask)
def test_a_part_of_a_tile_and_its_window_are_those_of_the_region(mask):
    q, k, v, do = draw((2, [20], 2, 1, 8))
    region = Region((1, 2), (3, 15), (5, 17), mask, window=5 if mask is Mask.CAUSAL else None)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3:15, 5:17] = seen(region, 12, 12)
    own = slice(3, 15), slice(1, 2)
    want = truth(q[own], k[:, 1:2], v[:, 1:2], do[own], 0.3, mask=mask[3:15])
    for backend in (BY_NAME["reference"], BY_NAME["torch-cpu"]):
        o, lse = output = forward_regions(backend, QKV(q, k, v), AttentionVariant(0.3), (region,))
        dq, dk, dv = backward_regions(backend, do, QKV(q, k, v), output, AttentionVariant(0.3), (region,))
        assert max(errors([o[own], lse[1:2, :, 3:15], dq[own], dk[:, 1:2], dv[:, 1:2]], want)) < 1e-13
        assert not any(t[:, 0].any() for t in (o, dq, dk, dv))


@CPU_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_shapes_and_dtypes_of_the_protocol(backend, dtype):
    q, do = torch.randn(2, 5, 3, 4, 8).to(dtype)
    k, v = torch.randn(2, 7, 3, 2, 8).to(dtype)
    qkv, variant = QKV(q, k, v), KernelVariant(0.5, Mask.FULL)
    o, lse = output = backend.forward(qkv, variant)
    assert (o.shape, o.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((3, 4, 5), torch.promote_types(dtype, torch.float32))
    grads = backend.backward(do, qkv, output, variant)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, dtype) for t in (q, k, v)]


def packed(q, k, v):
    """q, k, v as views of one buffer, side by side along the heads."""
    return torch.cat([q, k, v], 2).split([q.shape[2], k.shape[2], v.shape[2]], 2)


def heads_first(q, k, v):
    return tuple(t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in (q, k, v))


def batch_first(q, k, v):
    return tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))


@CPU_BACKENDS
@pytest.mark.parametrize("layout", [packed, heads_first, batch_first])
@pytest.mark.parametrize("mask", Mask)
def test_strides_do_not_matter(backend, layout, mask):
    q, k, v, do = draw((3, [37], 4, 2, 16))
    qkv, variant = QKV(q, k, v), KernelVariant(0.25, mask)
    o, lse = output = backend.forward(qkv, variant)
    want = [o, lse, *backend.backward(do, qkv, output, variant)]
    strided = QKV(*layout(q, k, v))
    assert not all(t.is_contiguous() for t in strided)
    got = list(backend.forward(strided, variant))
    strided_do, strided_o, _ = layout(do, o, o)
    got += backend.backward(strided_do, strided, AttentionOutput(strided_o, lse), variant)
    assert max(errors(got, want)) < 1e-14


@CPU_BACKENDS
@pytest.mark.parametrize("mask", Mask)
def test_inputs_are_not_written_to(backend, mask):
    q, k, v, do = draw((2, [20], 4, 2, 8))
    qkv, variant = QKV(q, k, v), KernelVariant(0.3, mask)
    o, lse = output = backend.forward(qkv, variant)
    tensors = [q, k, v, do, o, lse]
    originals = [t.clone() for t in tensors]
    backend.backward(do, qkv, output, variant)
    assert all(torch.equal(t, original) for t, original in zip(tensors, originals, strict=True))


@CPU_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_thousands_are_finite_and_right(backend, dtype):
    shape = (1, [16, 16], 2, 1, 16)
    tensors = draw(shape, dtype, spread=3000.0)
    want = truth(*tensors, 0.25)
    assert want[1].abs().max() > 3000
    got = tiled(backend, *(t.to(dtype) for t in tensors), 0.25, shape[1])
    assert all(t.isfinite().all() for t in got)
    assert max(errors(got[:2], want[:2])) < (1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("rows", [1, 7, 16, 33])
def test_the_reference_does_not_depend_on_its_block_of_rows(monkeypatch, rows):
    shape = (2, [33, 20], 4, 2, 8)
    tensors = draw(shape)
    want = tiled(BY_NAME["reference"], *tensors, 0.3, shape[1])
    monkeypatch.setattr(reference, "_BLOCK_ROWS", rows)
    assert max(errors(tiled(BY_NAME["reference"], *tensors, 0.3, shape[1]), want)) < 1e-14
