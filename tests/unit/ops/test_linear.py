import pytest
import torch
import torch.nn.functional as F

from megatron.ops.gradient_sum import GradientSum, GradientSums
from megatron.ops.linear import LinearTape, linear


def operands(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(3)
    x, weight, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 2, 5), (3, 5), (3,)))
    return x.to(dtype), torch.nn.Parameter(weight.to(dtype)), torch.nn.Parameter(b.to(dtype)) if bias else None


def test_without_a_tape_it_is_torch_s_linear():
    x, weight, bias = operands()
    y = linear(x, weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("how", ["computed", "replayed", "skipped"])
def test_gradients_are_torch_s_and_the_weight_s_go_to_the_sum(with_bias, is_frozen, transposed, how):
    x, weight, bias = operands(bias=with_bias)
    leaf = x.clone().requires_grad_()
    dy = torch.randn(4, 2, 3, dtype=torch.float64)
    want_y = F.linear(leaf, weight, bias)
    inputs = [leaf, *([bias] if with_bias else [])]
    want_dw, want_dx, *want_db = torch.autograd.grad(want_y, [weight, *inputs], dy)
    if transposed:
        weight, want_dw = torch.nn.Parameter(weight.detach().T.contiguous()), want_dw.T
    weight.requires_grad_(not is_frozen)
    sums = GradientSums([] if is_frozen else [weight])
    replayed = {0: want_y.detach()} if how == "replayed" else {}
    for _ in range(3):
        with LinearTape(replayed=replayed, skipped={0} if how == "skipped" else (), sums=sums).running():
            y = linear(leaf, weight, bias, transposed)
        dx, *db = torch.autograd.grad(y, inputs, dy)
        torch.testing.assert_close([dx, *db], [want_dx, *want_db])
        assert torch.allclose(y, want_y) if how != "skipped" else y.shape == want_y.shape
    assert sums.of(weight) is None if is_frozen else torch.allclose(sums.of(weight).total, 3 * want_dw)


def test_a_weight_without_a_sum_is_refused():
    x, weight, bias = operands()
    with LinearTape(sums=GradientSums([])).running(), pytest.raises(RuntimeError, match="none of the parameters"):
        linear(x, weight, bias)


def test_a_tape_counts_products_and_records_those_asked_for():
    x, weight, bias = operands()
    square = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))
    tape = LinearTape(recorded={0, 2})
    with tape.running():
        first = linear(x, weight, bias)
        (recorded,) = tape.take_outputs()
        assert recorded is first
        second = linear(first, square, None)
    third = linear(second, square, None)  # not on the tape
    assert tape.take_outputs() == []
    with tape.running():
        fourth = linear(third, square, None)
    assert tape.num_products == 3
    assert tape.take_outputs()[0] is fourth


def test_a_skipped_or_replayed_product_is_not_computed(monkeypatch):
    x, weight, bias = operands()
    monkeypatch.setattr(F, "linear", lambda *_: pytest.fail("computed"))
    with torch.no_grad(), LinearTape(skipped={0}, replayed={1: torch.full((1,), 7.0)}).running():
        assert linear(x, weight, bias).shape == (4, 2, 3)
        assert linear(x, weight, bias).item() == 7


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
