import pytest
import torch
import torch.nn.functional as F

from megatron.ops.cross_entropy import cross_entropy_with_gradient, token_losses


def case(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(11)
    logits = (scale * torch.randn(7, 13, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, 13, (7,), generator=generator)
    mask = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.5, 1.0, 0.0], dtype=torch.promote_types(dtype, torch.float32))
    return logits, labels, mask


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_and_gradient_are_torch_s(scale):
    logits, labels, mask = case(scale=scale)
    leaf = logits.clone().requires_grad_()
    want = (F.cross_entropy(leaf, labels, reduction="none") * mask).sum()
    want.backward()
    loss, dlogits = cross_entropy_with_gradient(logits, labels, mask)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(dlogits, leaf.grad, rtol=1e-13, atol=1e-13)
    assert torch.equal(token_losses(logits, labels, mask).sum(), loss)


def test_half_precision_logits_are_taken_in_fp32_and_their_gradient_returned_as_they_came():
    logits, labels, mask = case(torch.bfloat16)
    loss, dlogits = cross_entropy_with_gradient(logits, labels, mask)
    exact_loss, exact = cross_entropy_with_gradient(logits.double(), labels, mask.double())
    assert (loss.dtype, dlogits.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
    assert (dlogits - exact).norm() <= 4e-3 * exact.norm()


def test_a_masked_token_has_no_loss_and_no_gradient():
    logits, labels, mask = case()
    loss, dlogits = cross_entropy_with_gradient(logits, labels, torch.zeros_like(mask))
    assert loss == 0
    assert not dlogits.any()
