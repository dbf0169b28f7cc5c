"""Attention of what documents leave of a tile, with and without a kernel that takes many documents at once."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron.core.documents import Documents, Mask, in_local_blocks, tile_regions
from megatron.ops.attention import QKV, AttentionOutput, AttentionVariant, backward_regions, forward_regions
from megatron.ops.attention.reference import ReferenceAttention

SCALE = 0.3
VARIANT = AttentionVariant(SCALE)
TOKENS, HEADS, GROUPS, SIZE = 24, 4, 2, 8
SPANS = {
    "many": ((0, 5), (5, 6), (6, 13), (13, 15), (15, 24)),
    "gaps": ((0, 2), (2, 3), (3, 4), (4, 8), (10, 11), (12, 15), (15, 17), (17, 18), (18, 20)),
    "two": ((0, 11), (11, 24)),
    "none": (),
}


class Cutting(ReferenceAttention):
    """The reference as a kernel without windows."""

    has_windows = False

    def forward(self, qkv, variant):
        assert variant.window is None
        return super().forward(qkv, variant)

    def backward(self, do, qkv, output, variant):
        assert variant.window is None
        return super().backward(do, qkv, output, variant)


class Packing(ReferenceAttention):
    """The reference, with a kernel for packed documents that is a loop over them."""

    def __init__(self):
        self.calls = []

    def forward_packed(self, qkv, packed, variant):
        spans = self._spans(packed, len(qkv.q))
        parts = [self.forward(QKV(*(t[a:b].unsqueeze(1) for t in qkv)), variant) for a, b in spans]
        return torch.cat([o for o, _ in parts]).squeeze(1), torch.cat([lse for _, lse in parts], 2).squeeze(0)

    def backward_packed(self, do, qkv, output, packed, variant):
        parts = []
        for a, b in self._spans(packed, len(qkv.q)):
            own_do, own_o, *own = (t[a:b].unsqueeze(1) for t in (do, output.o, *qkv))
            own_output = AttentionOutput(own_o, output.lse[None, :, a:b])
            parts.append(self.backward(own_do, QKV(*own), own_output, variant))
        return tuple(torch.cat(grads).squeeze(1) for grads in zip(*parts, strict=True))

    def _spans(self, packed, num_tokens):
        starts, lengths = packed.cu_seqlens, packed.cu_seqlens.diff()
        assert starts.dtype == torch.int32
        assert (starts[0], starts[-1], lengths.max()) == (0, num_tokens, packed.max_seqlen)
        self.calls.append(len(lengths))
        return list(pairwise(starts.tolist()))


def inputs(batch):
    generator = torch.Generator().manual_seed(5)
    shapes = [(TOKENS, batch, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_mask(documents, q, k, v, window=TOKENS):
    """o from scores in which everything else is masked; what sees nothing is 0."""
    k, v = (t.repeat_interleave(HEADS // GROUPS, 2) for t in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * SCALE
    mask = torch.zeros(len(documents.spans), 1, TOKENS, TOKENS, dtype=torch.bool)
    for row, spans in enumerate(documents.spans):
        for start, end in spans:
            mask[row, :, start:end, start:end] = torch.ones(end - start, end - start).tril().triu(1 - window).bool()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,kbhd->qbhd", weights, v)


@pytest.mark.parametrize("rows", [[(0, TOKENS)], [(0, 6), (18, TOKENS)], [(6, 18)]], ids=str)
@pytest.mark.parametrize("backend", [ReferenceAttention(), Packing()], ids=["one by one", "packed"])
@pytest.mark.parametrize("names", [*((name,) for name in SPANS), ("many", "gaps", "none")], ids=" and ".join)
def test_documents_of_a_tile_on_the_diagonal_are_masked_attention(backend, names, rows):
    documents = Documents(tuple(SPANS[name] for name in names))
    regions = tile_regions(documents, rows, (0, TOKENS))
    own = torch.cat([torch.arange(*span) for span in rows])
    q, k, v, do = inputs(len(names))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    expected = by_mask(documents, *leaves)[own]
    gradients = torch.autograd.grad(expected, leaves, do[own])
    with torch.no_grad():
        o, lse = output = forward_regions(backend, QKV(q[own], k, v), VARIANT, regions)
        found = backward_regions(backend, do[own], QKV(q[own], k, v), output, VARIANT, regions)
    assert lse.isfinite().all()
    torch.testing.assert_close(o, expected.detach())
    for gradient, want in zip(found, (gradients[0][own], *gradients[1:]), strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 24])
@pytest.mark.parametrize("backend", [ReferenceAttention(), Packing(), Cutting()], ids=["one by one", "packed", "cut"])
@pytest.mark.parametrize("names", [("many",), ("many", "gaps", "none")], ids=" and ".join)
def test_windows_of_documents_are_masked_attention(backend, names, window):
    documents = Documents(tuple(SPANS[name] for name in names))
    regions = tile_regions(documents, [(0, TOKENS)], (0, TOKENS))
    regions = [replace(region, window=window) for region in regions]
    q, k, v, do = inputs(len(names))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    expected = by_mask(documents, *leaves, window)
    gradients = torch.autograd.grad(expected, leaves, do)
    with torch.no_grad():
        o, lse = output = forward_regions(backend, QKV(q, k, v), VARIANT, regions)
        found = backward_regions(backend, do, QKV(q, k, v), output, VARIANT, regions)
    assert lse.isfinite().all()
    torch.testing.assert_close([o, *found], [expected.detach(), *gradients])


def test_only_runs_of_many_documents_are_packed():
    for name, calls in {"many": [5], "gaps": [4, 4], "two": []}.items():
        backend, (q, k, v, _) = Packing(), inputs(1)
        regions = tile_regions(Documents((SPANS[name],)), [(0, TOKENS)], (0, TOKENS))
        forward_regions(backend, QKV(q, k, v), VARIANT, regions)
        assert backend.calls == calls


def test_a_tile_below_the_diagonal_is_a_rectangle_and_nothing_elsewhere():
    documents = Documents((((0, 4), (4, 30), (30, 48)),))
    (region,) = regions = tile_regions(documents, [(24, 48)], (0, 24))
    assert (region.queries, region.keys) == ((0, 6), (4, 24))
    q, k, v, _ = inputs(1)
    o, lse = forward_regions(ReferenceAttention(), QKV(q, k, v), VARIANT, regions)
    want, want_lse = ReferenceAttention().forward(QKV(q[:6], k[4:], v[4:]), VARIANT.kernel(Mask.FULL))
    assert torch.equal(o[:6], want)
    assert torch.equal(lse[:, :, :6], want_lse)
    assert not o[6:].any()
    assert (lse[:, :, 6:] == torch.finfo(lse.dtype).min).all()


def test_local_blocks_of_several_sequences_are_not_packed():
    """They are the same for all sequences, which one call for each block serves; of one sequence they are packed."""
    for batch, calls in {1: [6], 2: []}.items():
        backend, (q, k, v, _) = Packing(), inputs(batch)
        regions = tile_regions(in_local_blocks(None, 4, TOKENS), [(0, TOKENS)], (0, TOKENS))
        o, _ = forward_regions(backend, QKV(q, k, v), VARIANT, regions)
        blocks = Documents((tuple(pairwise(range(0, TOKENS + 1, 4))),) * batch)
        torch.testing.assert_close(o, by_mask(blocks, q, k, v))
        assert backend.calls == calls


@pytest.mark.parametrize("limits", [{"window": 0}, {"local_block": -1}], ids=str)
def test_a_variant_in_which_a_token_does_not_see_itself_is_refused(limits):
    (name,) = limits
    with pytest.raises(ValueError, match=rf"{name} \({limits[name]}\) of attention must be at least 1 token"):
        AttentionVariant(SCALE, **limits)
