import pytest
import torch

from megatron.ops.merge import merge, merge_, merge_sinks_, sink_gradients

S, B, H, D = 5, 2, 3, 4


def part(seed, lse_offset=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(S, B, H, D, generator=generator, dtype=torch.float64)
    lse = torch.randn(B, H, S, generator=generator, dtype=torch.float64) + lse_offset
    return o.to(dtype), lse.to(dtype)


def merged(*parts):
    o, lse = (t.clone() for t in parts[0])
    for other in parts[1:]:
        merge_(o, lse, *other)
    return o, lse


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_merging_is_softmax_over_the_concatenation(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(B, H, S, 30, generator=generator, dtype=torch.float64)
    values = torch.randn(B, H, 30, D, generator=generator, dtype=torch.float64)
    parts = []
    for s, v in zip(scores.split([1, 12, 17], -1), values.split([1, 12, 17], 2), strict=True):
        parts.append(((s.softmax(-1) @ v).permute(2, 0, 1, 3).to(dtype), s.logsumexp(-1).to(dtype)))
    o, lse = merged(*parts)
    torch.testing.assert_close(o.double(), (scores.softmax(-1) @ values).permute(2, 0, 1, 3), rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(merge(parts), o, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e4, 1e30, 200.0])
def test_the_larger_part_wins_to_the_last_bit_however_large_the_gap(dtype, gap):
    small, large = part(1, dtype=dtype), part(2, gap, dtype)
    for result in (merged(small, large), merged(large, small)):
        assert torch.equal(result[0], large[0])
        assert torch.equal(result[1], large[1])
    assert torch.equal(merge([small, large]), large[0])


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30, -1e30])
def test_two_equal_parts_of_any_log_sum_exp_are_averaged(offset):
    (o_a, lse), (o_b, _) = part(1, offset, torch.float32), part(2)
    o, merged_lse = merged((o_a, lse), (o_b, lse))
    torch.testing.assert_close(o, (o_a + o_b.float()) / 2)
    torch.testing.assert_close(merged_lse, lse + torch.log(torch.tensor(2.0)))
    torch.testing.assert_close(merge([(o_a, lse), (o_b.float(), lse)]), o)


def test_the_order_of_merging_does_not_matter():
    a, b, c = (part(seed, offset) for seed, offset in ((1, 0), (2, 3), (3, -4)))
    left, right = merged(merged(a, b), c), merged(a, merged(b, c))
    other = merged(c, a, b)
    for x, y, z in zip(left, right, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(x, z, rtol=1e-14, atol=1e-14)


def test_the_other_part_is_left_as_it_is_and_may_be_of_lower_precision():
    (o, lse), (other_o, other_lse) = part(1, dtype=torch.float32), part(2, dtype=torch.float32)
    other_o = other_o.bfloat16()
    before = other_o.clone(), other_lse.clone()
    at_once = merge([(o.bfloat16(), lse), (other_o, other_lse)])
    merge_(o, lse, other_o, other_lse)
    assert (o.dtype, lse.dtype, at_once.dtype) == (torch.float32, torch.float32, torch.float32)
    assert torch.equal(other_o, before[0])
    assert torch.equal(other_lse, before[1])


def test_strided_results_of_a_kernel_can_be_merged_in_place():
    a, b = part(1), part(2)
    want = merged(a, b)
    o = a[0].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    lse = a[1].transpose(0, 2).contiguous().transpose(0, 2)
    merge_(o, lse, b[0], b[1])
    assert torch.equal(o, want[0])
    assert torch.equal(lse, want[1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_sinks_join_the_softmax_and_have_its_gradient(dtype, tolerance, offset):
    """Finite for any log-sum-exp, that of a query without keys included."""
    o, lse = part(1, offset)
    o, lse = o.to(dtype), lse.to(torch.promote_types(dtype, torch.float32))
    lse[0, 0, 0], o[0, 0, 0] = torch.finfo(lse.dtype).min, 0.0
    sinks = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    logits = torch.stack([lse.double(), sinks[:, None].expand_as(lse)])
    want = o.double() * logits.softmax(0)[0].permute(2, 0, 1).unsqueeze(-1)
    do = part(3)[0]
    (dsinks,) = torch.autograd.grad(want, sinks, do)
    merge_sinks_(o, lse, sinks.detach())
    torch.testing.assert_close(o.double(), want.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), logits.detach().logsumexp(0), rtol=tolerance, atol=tolerance)
    got = sink_gradients(o, do.to(dtype), lse, sinks.detach())
    torch.testing.assert_close(got.double(), dsinks, rtol=10 * tolerance, atol=10 * tolerance)
