"""Which products a backward pass needs is held against poisoning each of them in turn."""

import pytest
import torch
import torch.nn.functional as F

from megatron.config import Recompute
from megatron.fpdt.layer_trace import trace_layer
from megatron.fpdt.seam import StreamedAttention, run_with_output
from megatron.ops.attention import AttentionVariant
from megatron.ops.linear import LinearTape, linear
from tests.unit.fpdt.one_block import HIDDEN, LENGTH, one_layer, positions, residual
from tests.unit.model.small_model import ON_DEVICE, small_config, small_gpt_config


def traced(layer):
    return trace_layer(lambda *args: type(layer).forward(layer, *args), residual(), positions())


def poisoned(layer, number):
    """Whether NaN in place of a product's output reaches a gradient."""

    class Poison(LinearTape):
        def product(self, x, weight, bias, transposed=False):
            is_due = self.num_products == number
            y = super().product(x, weight, bias, transposed)
            return y + torch.nan if is_due else y

    x, o = residual().requires_grad_(), torch.ones(LENGTH, 2, *layer.heads, dtype=torch.float64).requires_grad_()
    y = run_with_output(lambda *args: type(layer).forward(layer, *args), Poison(), lambda call: o, x, positions())
    parameters = [p for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y, [x, o, *parameters], torch.ones_like(y), allow_unused=True)
    return any(not g.isfinite().all() for g in gradients if g is not None)


CONFIGS = {
    "llama": (small_config, {}),
    "gpt": (small_gpt_config, {}),
    "parallel residual": (small_gpt_config, {"parallel_residual": True}),
    "dropout": (small_gpt_config, {"hidden_dropout": 0.5}),
    "query and key norms": (small_config, {"qk_layernorm": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frozen", [(), ("mlp",), ("self_attention", "mlp")])
def test_a_product_is_skipped_where_poison_in_it_reaches_no_gradient(name, frozen):
    config_of, changes = CONFIGS[name]
    _, layer = one_layer(ON_DEVICE, config_of=config_of, **changes)
    layer.heads = layer.self_attention.num_heads, layer.self_attention.head_size
    for part in frozen:
        getattr(layer, part).requires_grad_(False)
    trace = traced(layer)
    assert trace.before == (0,)
    assert trace.skipped == {number for number in range(4) if not poisoned(layer, number)}
    assert {*trace.needed_after} == {1, 2, 3} - trace.skipped
    assert trace.before_attention_alone == {0}
    assert 3 in trace.skipped


class Odd(torch.nn.Module):
    """Products after attention: one that is scaled, one that a factor reads, one whose value nobody reads."""

    heads = 3, 8

    def __init__(self):
        super().__init__()
        self.core_attention = StreamedAttention()
        shape = (4, HIDDEN, HIDDEN)
        self.weights = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5)).double())
        self.gamma = torch.nn.Parameter(torch.ones(HIDDEN, dtype=torch.float64))

    def forward(self, x, positions):
        q = F.layer_norm(linear(x, self.weights[0], None), (HIDDEN,)).unflatten(2, (3, 8))
        o = self.core_attention(q, q[:, :, :2], AttentionVariant(1.0), 0.0, None).flatten(2)
        halved = 0.5 * linear(o, self.weights[1], None)
        gated = self.gamma * linear(o, self.weights[2], None)
        return q.flatten(2) + halved + gated + linear(o, self.weights[3], None).unsqueeze(0).squeeze(0)


def test_a_factor_needs_the_other_factor_and_a_number_does_not():
    layer = Odd()
    trace = traced(layer)
    assert trace.skipped == {number for number in range(4) if not poisoned(layer, number)} == {1, 3}
    assert trace.before_attention_alone == set(), "y depends on the queries too"
    layer.gamma.requires_grad_(False)
    assert traced(layer).skipped == {1, 2, 3}


class LowRank(torch.nn.Module):
    """A wide product, and two that pass through one number; their sum is normalized."""

    def __init__(self):
        super().__init__()
        self.core_attention = StreamedAttention()
        shapes = ((HIDDEN, HIDDEN), (1, HIDDEN), (HIDDEN, 1))
        self.weights = torch.nn.ParameterList(torch.ones(shape, dtype=torch.float64) for shape in shapes)

    def forward(self, x, positions):
        wide, down, up = self.weights
        q = F.layer_norm(linear(x, wide, None) + linear(linear(x, down, None), up, None), (HIDDEN,)).unflatten(
            2, (3, 8)
        )
        return self.core_attention(q, q[:, :, :2], AttentionVariant(1.0), 0.0, None).flatten(2)


def test_a_product_of_few_inputs_is_recomputed():
    trace = traced(LowRank())
    assert trace.before == (0, 1, 2)
    assert trace.saved_before(Recompute.NONE) == (0, 1)


@pytest.mark.parametrize(
    "recompute, before, after",
    [(Recompute.KV, (), ()), (Recompute.ALL, (), ()), (Recompute.MLP, (0,), (1,)), (Recompute.NONE, (0,), (1, 2))],
)
def test_what_is_saved_of_a_slice(recompute, before, after):
    trace = traced(one_layer(ON_DEVICE)[1])
    assert trace.saved_before(recompute) == before
    assert trace.saved_after(recompute) == after
    assert bool(before) == recompute.saves_products
