import pytest
import torch
import torch.nn.functional as F

from megatron.ops.gradient_sum import GradientSum
from megatron.ops.linear import linear


def operands(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(3)
    x, weight, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 2, 5), (3, 5), (3,)))
    return x.to(dtype), torch.nn.Parameter(weight.to(dtype)), torch.nn.Parameter(b.to(dtype)) if bias else None


def test_without_a_sum_it_is_torch_s_linear():
    x, weight, bias = operands()
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight, bias, output_needed=False), F.linear(x, weight, bias))
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("output_needed", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_torch_s_and_the_weight_s_go_to_the_sum(output_needed, with_bias):
    x, weight, bias = operands(bias=with_bias)
    leaf = x.clone().requires_grad_()
    dy = torch.randn(4, 2, 3, dtype=torch.float64)
    inputs = [leaf, weight, *([bias] if with_bias else [])]
    want_dx, want_dw, *want_db = torch.autograd.grad(F.linear(leaf, weight, bias), inputs, dy)
    weight.gradient_sum = GradientSum()
    for _ in range(3):
        y = linear(leaf, weight, bias, output_needed)
        dx, dw, *db = torch.autograd.grad(y, inputs, dy, allow_unused=True)
        assert dw is None
        torch.testing.assert_close([dx, *db], [want_dx, *want_db])
    torch.testing.assert_close(weight.gradient_sum.total, 3 * want_dw)
    if output_needed:
        torch.testing.assert_close(y, F.linear(leaf, weight, bias))
    else:
        assert y.shape == (4, 2, 3)
        assert y.untyped_storage().nbytes() == y.itemsize


def test_a_sum_is_not_touched_where_no_gradient_is_wanted():
    x, weight, bias = operands()
    weight.gradient_sum = GradientSum()
    with torch.no_grad():
        y = linear(x, weight, bias, output_needed=False)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert weight.gradient_sum.total is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_summed_without_rounding_them_to_half_precision(dtype):
    total = GradientSum()
    dy, x = (torch.randn(64, n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (6, 4))
    for _ in range(5):
        total.add_product(dy, x)
    want = 5 * dy.T.double() @ x.double()
    assert total.total.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert (total.total - want).norm() <= tolerance * want.norm()


def test_a_product_that_fp16_cannot_hold_is_summed():
    total = GradientSum()
    total.add_product(
        torch.full((1000, 1), 50.0, dtype=torch.float16), torch.full((1000, 1), 50.0, dtype=torch.float16)
    )
    assert total.total.item() == 2.5e6
