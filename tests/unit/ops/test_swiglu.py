import torch

from megatron.ops.swiglu import swiglu


def test_the_gate_comes_first_and_is_the_one_that_is_squashed():
    x = torch.randn(3, 2, 10, dtype=torch.float64)
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate * torch.sigmoid(gate) * up)


def test_gradients_are_those_of_differences():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_gradients_in_half_precision_are_rounded_once():
    x, dy = torch.randn(64, 2, 10).bfloat16(), torch.randn(64, 2, 5).bfloat16()
    exact, half = x.double().requires_grad_(), x.clone().requires_grad_()
    swiglu(exact).backward(dy.double())
    swiglu(half).backward(dy)
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2**-8, atol=1e-5)
