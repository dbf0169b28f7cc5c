"""Any module that calls attention once can be streamed."""

from dataclasses import replace

import pytest
import torch

from megatron.config import Recompute
from megatron.fpdt.block import StreamedBlock
from megatron.fpdt.block_chain import BlockChain
from megatron.fpdt.seam import StreamedAttention
from megatron.ops.attention import AttentionVariant
from megatron.ops.linear import linear
from tests.unit.fpdt.one_block import HIDDEN, TIERS, one_layer, positions, residual
from tests.unit.model.small_model import (
    ON_DEVICE,
    assert_same_gradients,
    relative_error,
)


class OneFactor(torch.nn.Module):
    """A layer whose queries, keys and values share memory, and of whose parameters one takes no part."""

    layer_number, uses_dropout, variant = 1, False, AttentionVariant(0.5)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((HIDDEN,), 0.5, dtype=torch.float64))
        self.idle = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.core_attention = StreamedAttention()

    def forward(self, x_SBh, positions_BS):
        q = (x_SBh * self.weight).unflatten(2, (3, 8))
        return x_SBh + self.core_attention(q, q[:, :, :2], self.variant, 0.0, None).flatten(2)


class SharedNorm(OneFactor):
    """A layer whose MLP reads what its attention reads."""

    def forward(self, x_SBh, positions_BS):
        normed = x_SBh * self.weight
        q = torch.nn.functional.layer_norm(normed, (HIDDEN,)).unflatten(2, (3, 8))
        return self.core_attention(q, q[:, :, :2], self.variant, 0.0, None).flatten(2) + q.flatten(2).tanh()


class GatedAttention(OneFactor):
    """A layer whose attention output is gated by the product from which the queries are computed."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.eye(HIDDEN, dtype=torch.float64) + 0.1)

    def forward(self, x_SBh, positions_BS):
        product = linear(x_SBh * self.weight, self.matrix, None)
        q = product.unflatten(2, (3, 8))
        o = self.core_attention(q, q[:, :, :2], self.variant, 0.0, None)
        return x_SBh + o.flatten(2) * product.sigmoid()


class Limited(OneFactor):
    """A layer whose window and local blocks are no multiples of a chunk, with sinks that are part of a parameter."""

    variant = AttentionVariant(0.5, window=19, local_block=27)

    def __init__(self, sink_dtype=torch.float64):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([[1.0, -0.5, 0.3], [0.2, -0.1, 0.7]], dtype=sink_dtype))

    def sinks(self):
        return self.table[1]

    def forward(self, x_SBh, positions_BS):
        q = (x_SBh * self.weight).unflatten(2, (3, 8))
        return x_SBh + self.core_attention(q, q[:, :, :2], self.variant, 0.0, None, self.sinks()).flatten(2)


class Cast(Limited):
    """A layer whose sinks are computed from a parameter."""

    def sinks(self):
        return (self.table[0] * self.table[1]).float().double()


class Tied(Limited):
    """A layer whose sinks share a node with its queries."""

    def forward(self, x_SBh, positions_BS):
        scaled = self.table[1].exp() * self.weight[:3]
        q = (x_SBh * self.weight).unflatten(2, (3, 8)) * scaled[:, None]
        return x_SBh + self.core_attention(q, q[:, :, :2], self.variant, 0.0, None, scaled).flatten(2)


@TIERS
@pytest.mark.parametrize("kind", [OneFactor, SharedNorm, GatedAttention, Limited, Cast, Tied])
@pytest.mark.parametrize("slice_length", [5, 16])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_any_module_that_calls_attention_once_can_be_streamed(execution, kind, slice_length, recompute):
    stream = one_layer(replace(execution, recompute=recompute, slice_length=slice_length))[0].stream
    layer, x, dy = kind(), residual().requires_grad_(), residual(seed=2)
    StreamedBlock(stream, layer, BlockChain(stream))(x, positions()).backward(dy)
    assert torch.equal(dy, residual(seed=2))
    leaf, want = residual().requires_grad_(), kind()
    want.core_attention = plain_attention
    want(leaf, positions()).backward(residual(seed=2))
    assert layer.idle.grad is None
    tolerance = 1e-6 if kind is Cast else 1e-13
    assert relative_error(x.grad, leaf.grad) < tolerance
    wanted = {name: p.grad for name, p in want.named_parameters()}
    assert_same_gradients({name: p.grad for name, p in layer.named_parameters()}, wanted, tolerance)


def plain_attention(q, kv, variant, dropout, documents, sinks=None):
    """From the definition, with a dense mask."""
    k, v = (t.expand(-1, -1, q.shape[2], -1) for t in kv.chunk(2, 2))
    query, key = torch.arange(len(q))[:, None], torch.arange(len(q))
    seen = (key <= query) & (query - key < (variant.window or len(q)))
    if variant.local_block:
        seen &= query // variant.local_block == key // variant.local_block
    scores = (torch.einsum("qbhd,kbhd->bhqk", q, k) * variant.scale).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1)[..., : len(q)], v)


@pytest.mark.parametrize("chunk_size", [16, 4])
def test_the_gradient_of_half_precision_sinks_is_rounded_once(chunk_size):
    stream = one_layer(replace(ON_DEVICE, chunk_size=chunk_size))[0].stream
    layer, want = Limited(torch.bfloat16), Limited()
    want.table.data.copy_(layer.table)
    StreamedBlock(stream, layer, BlockChain(stream))(residual(), positions()).backward(residual(seed=2))
    want.core_attention = plain_attention
    want(residual(), positions()).backward(residual(seed=2))
    assert torch.equal(layer.table.grad, want.table.grad.bfloat16())


def test_frozen_sinks_get_no_gradient():
    stream = one_layer(ON_DEVICE)[0].stream
    layer, want = Limited(), Limited()
    layer.table.requires_grad_(False)
    for each in (layer, want):
        StreamedBlock(stream, each, BlockChain(stream))(residual(), positions()).backward(residual(seed=2))
    assert layer.table.grad is None
    assert torch.equal(layer.weight.grad, want.weight.grad)


def test_sinks_of_another_number_of_heads_are_refused():
    stream = one_layer(ON_DEVICE)[0].stream
    layer = Limited()
    layer.sinks = lambda: layer.table[1, :2]
    with pytest.raises(ValueError, match=r"a sink for each of the 3 query heads is needed, got a tensor \(2,\)"):
        StreamedBlock(stream, layer, BlockChain(stream))(residual(), positions())


class Twice(OneFactor):
    def forward(self, x_SBh, positions_BS):
        return super().forward(super().forward(x_SBh, positions_BS), positions_BS)


class Never(OneFactor):
    def forward(self, x_SBh, positions_BS):
        return x_SBh * self.weight


@pytest.mark.parametrize("kind, times", [(Twice, "2 times"), (Never, "0 times")])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_does_not_call_attention_once_is_refused(kind, times, training):
    stream = one_layer(ON_DEVICE)[0].stream
    message = f"called its attention {times}" if training else "the layer has (not )?called its attention"
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match=message):
        StreamedBlock(stream, kind(), BlockChain(stream))(residual(), positions())
    assert torch.is_grad_enabled()


class Changeable(OneFactor):
    """A layer whose attention call does not have the variant that the layer says."""

    def forward(self, x_SBh, positions_BS):
        q = x_SBh.unflatten(2, (3, 8))
        return self.core_attention(q, q[:, :, :2], AttentionVariant(0.5, window=3), 0.0, None).flatten(2)


@pytest.mark.parametrize("slice_length", [5, 16])
def test_a_call_with_another_variant_than_the_layers_is_refused(slice_length):
    stream = one_layer(replace(ON_DEVICE, slice_length=slice_length))[0].stream
    with pytest.raises(RuntimeError, match=r"window=3.*planned for its own variant.*window=None"):
        StreamedBlock(stream, Changeable(), BlockChain(stream))(residual(), positions())
    assert torch.is_grad_enabled()
