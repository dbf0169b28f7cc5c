"""Fused functions, and products summed in fp32, on a GPU: no further from fp64 than the same arithmetic as written."""

import pytest
import torch

from megatron.ops.cross_entropy import cross_entropy_with_gradient, token_losses
from megatron.ops.gradient_sum import GradientSum
from megatron.ops.merge import add_key_value_gradients_, merge_
from megatron.ops.rope import RotaryEmbedding, split_and_rotate
from megatron.ops.swiglu import swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LENGTHS_AND_BATCHES = pytest.mark.parametrize("length, batch", [(256, 1), (200, 1), (72, 3)])


def draw(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)


def assert_rounded_once(got, exact, units=1.0):
    """Assert that results are the exact ones, up to `units` roundings to their dtype."""
    tolerance = units * torch.finfo(got.dtype).eps
    assert (got.double() - exact).norm() <= tolerance * exact.norm()


@LENGTHS_AND_BATCHES
def test_swiglu_and_its_gradient(length, batch):
    x, dy = draw(length, batch, 512), draw(length, batch, 256, seed=1)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaf = x.to(dtype).requires_grad_()
        y = swiglu(leaf)
        y.backward(dy.to(dtype))
        results.append((y.detach(), leaf.grad))
    for exact, got in zip(*results, strict=True):
        assert_rounded_once(got, exact)


@LENGTHS_AND_BATCHES
@pytest.mark.parametrize("rotary_size", [64, 16])
def test_split_and_rotate_and_its_gradient(length, batch, rotary_size):
    qkv = draw(length, batch, 2, 6, 64)
    positions = torch.arange(length, device="cuda").expand(batch, length) + 1_000_000
    gradients = draw(length, batch, 8, 64, seed=1), draw(length, batch, 4, 64, seed=2)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaf = qkv.to(dtype).requires_grad_()
        outputs = split_and_rotate(leaf, *RotaryEmbedding(rotary_size, 5e5).cos_sin(positions, dtype))
        torch.autograd.backward(outputs, [g.to(dtype) for g in gradients])
        results.append((*(t.detach() for t in outputs), leaf.grad))
    for exact, got in zip(*results, strict=True):
        assert_rounded_once(got, exact)


@LENGTHS_AND_BATCHES
def test_merge(length, batch):
    o, other = draw(length, batch, 8, 64, dtype=torch.float32), draw(length, batch, 8, 64, seed=1)
    lse, other_lse = (10 * draw(batch, 8, length, dtype=torch.float32, seed=s) for s in (2, 3))
    exact, exact_lse = o.double(), lse.double()
    merge_(exact, exact_lse, other.double(), other_lse.double())
    merge_(o, lse, other, other_lse)
    assert_rounded_once(o, exact, units=4)
    assert_rounded_once(lse, exact_lse, units=4)


@LENGTHS_AND_BATCHES
def test_gradients_of_keys_and_values_are_added_to_a_sum_in_place(length, batch):
    total, dk, dv = (
        draw(length, batch, 4, 64, dtype=torch.float32),
        draw(length, batch, 2, 64),
        draw(length, batch, 2, 64),
    )
    want = total + torch.cat([dk, dv], 2)
    add_key_value_gradients_(total, dk, dv)
    assert torch.equal(total, want)


@pytest.mark.parametrize("num_tokens, num_classes", [(64, 50257), (33, 1000)])
def test_cross_entropy_and_its_gradient(num_tokens, num_classes):
    logits = 5 * draw(num_tokens, num_classes)
    labels = torch.randint(0, num_classes, (num_tokens,), device="cuda")
    mask = (torch.rand(num_tokens, device="cuda") > 0.2).float()
    exact_loss, exact = cross_entropy_with_gradient(logits.double(), labels, mask.double())
    loss, dlogits = cross_entropy_with_gradient(logits, labels, mask)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(token_losses(logits, labels, mask).sum().double(), exact_loss, rtol=1e-5, atol=0)
    assert_rounded_once(dlogits, exact)


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_loss_does_not_depend_on_the_lengths_before():
    def losses(*lengths):
        torch._dynamo.reset()
        results = {}
        for length in lengths:
            logits, labels = draw(length, 32000), torch.arange(length, device="cuda")
            results[length], _ = cross_entropy_with_gradient(logits, labels, torch.ones(length, device="cuda"))
        return results

    whole, resumed = losses(3000, 1500, 700, 3000, 1500), losses(1500, 3000)
    assert {length: whole[length] for length in resumed} == resumed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_summed_in_fp32(dtype):
    total, pairs = GradientSum(), [(draw(512, 96, dtype=dtype, seed=s), draw(512, 80, dtype=dtype)) for s in range(4)]
    for dy, x in pairs:
        total.add_product(dy, x)
    exact = sum(dy.double().T @ x.double() for dy, x in pairs)
    assert total.total.dtype == torch.float32
    assert (total.total - exact).norm() <= 1e-6 * exact.norm()
