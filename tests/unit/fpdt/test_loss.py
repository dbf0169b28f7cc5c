from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.head_layout import HeadLayout
from megatron.core.parallel_state import ParallelState
from megatron.fpdt import loss as loss_module
from megatron.fpdt.loss import stream_loss
from megatron.fpdt.observer import Observer
from megatron.fpdt.store import ChunkStore
from megatron.fpdt.stream import Stream
from megatron.ops.attention.reference import ReferenceAttention
from megatron.ops.linear import linear

HIDDEN, CLASSES = 12, 37
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class Head(nn.Module):
    def __init__(self, dtype, norm="layernorm", classes=CLASSES, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.num_classes = classes
        self.final_layernorm = NORMS[norm](HIDDEN, dtype=dtype)
        self.output_layer = nn.Linear(HIDDEN, classes, bias=False, dtype=dtype)
        with torch.no_grad():
            for p in self.final_layernorm.parameters():
                p.add_(0.3 * torch.randn(HIDDEN, generator=generator))
            self.output_layer.weight.copy_(scale * torch.randn(classes, HIDDEN, generator=generator))

    def logits(self, x):
        return linear(self.final_layernorm(x), self.output_layer.weight, None)


def stream_of(chunk_length=16, offloading=False):
    store = ChunkStore(torch.device("cpu"), offloading)
    return Stream(store, ReferenceAttention(), ParallelState(), HeadLayout(1, 1), chunk_length)


def inputs(length=40, batch=3, dtype=torch.float64, classes=CLASSES):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, batch, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator).mul(3).floor()  # 0, 1 and 2: a mask may weigh
    return x, labels, mask


def plain_loss(head, x, labels, mask):
    """Torch's own cross-entropy, logits whole, in fp32 (fp64 for fp64)."""
    logits = head.output_layer(head.final_layernorm(x)).to(torch.promote_types(x.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.T.flatten(), reduction="none")
    return (losses * mask.T.flatten()).sum()


def run(loss_of, head, x, labels, mask, scale=1.0):
    """[loss, dx, dW, d norm..], the loss scaled before the backward pass."""
    x = x.clone().requires_grad_()
    head.zero_grad()
    loss = loss_of(head, x, labels, mask)
    (loss * scale).backward()
    parameters = [head.output_layer.weight, *head.final_layernorm.parameters()]
    return [loss.detach(), x.grad, *(p.grad.clone() for p in parameters)]


def streamed(stream):
    return lambda head, x, labels, mask: stream_loss(stream, head, x, labels, mask)


def errors(got, want):
    return [float((g.double() - w.double()).norm() / w.double().norm()) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("offloading", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tile_logits", [1, CLASSES * 3 * 5, 2**26], ids=["1 token", "5 tokens", "whole chunk"])
@pytest.mark.parametrize("chunk_length", [7, 16, 64])
def test_loss_and_gradients_are_cross_entropy_s(monkeypatch, offloading, norm, tile_logits, chunk_length):
    monkeypatch.setattr(loss_module, "TILE_LOGITS", tile_logits)
    head, arguments = Head(torch.float64, norm), inputs()
    want = run(plain_loss, head, *arguments)
    got = run(streamed(stream_of(chunk_length, offloading)), head, *arguments)
    assert max(errors(got, want)) < 1e-13


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_may_have_any_dtype(mask_dtype):
    head, (x, labels, mask) = Head(torch.float64), inputs()
    want = run(plain_loss, head, x, labels, mask.clamp(max=1))
    got = run(streamed(stream_of()), head, x, labels, mask.clamp(max=1).to(mask_dtype))
    assert max(errors(got, want)) < 1e-13


def test_with_all_tokens_masked_loss_and_gradients_are_zero():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    for result in run(streamed(stream_of()), head, x, labels, torch.zeros_like(mask)):
        assert not result.any()


def test_masked_tokens_pass_no_gradient():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    _, dx, *_ = run(streamed(stream_of()), head, x, labels, mask)
    assert torch.equal(dx.abs().sum(-1).T > 0, mask > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_are_finite_and_right(dtype):
    head, arguments = Head(dtype, scale=3000.0), inputs(dtype=dtype)
    logits = head.output_layer(head.final_layernorm(arguments[0]))
    assert logits.abs().max() > 1e4
    want = run(plain_loss, head.double(), arguments[0].double(), *arguments[1:])
    got = run(streamed(stream_of()), head.to(dtype), *arguments)
    assert all(t.isfinite().all() for t in got)
    assert max(errors(got, want)) < (1e-12 if dtype == torch.float64 else 1e-3)


def test_a_certain_and_wrong_prediction_has_the_loss_of_the_gap_and_not_infinity():
    head = Head(torch.float32)
    x, labels, mask = torch.ones(1, 1, HIDDEN), torch.tensor([[1]]), torch.ones(1, 1)
    with torch.no_grad():
        head.final_layernorm.weight.zero_()
        head.final_layernorm.bias.fill_(1.0)
        head.output_layer.weight.zero_()
        head.output_layer.weight[0, 0] = 500.0
    assert stream_loss(stream_of(), head, x, labels, mask).item() == 500.0


class LargestTensor(TorchDispatchMode):
    """Within this context, `elements` is the size of the largest storage that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_full_logits_are_never_materialized(monkeypatch, grad):
    classes, tile_logits = 500, 500 * 32
    monkeypatch.setattr(loss_module, "TILE_LOGITS", tile_logits)
    head, (x, labels, mask) = Head(torch.float32, classes=classes), inputs(400, 2, torch.float32, classes)
    stream = stream_of(chunk_length=200)
    with torch.set_grad_enabled(grad), LargestTensor() as largest:
        loss = stream_loss(stream, head, x.requires_grad_(grad), labels, mask)
        if grad:
            loss.backward()
    assert largest.elements <= tile_logits < 400 * 2 * classes / 8


def test_evaluation_computes_no_gradients_and_holds_no_host_memory():
    head, arguments = Head(torch.float64), inputs()
    stream = stream_of(offloading=True)
    with torch.no_grad():
        loss = stream_loss(stream, head, *arguments)
    assert not loss.requires_grad
    assert stream.store.pool.peak_used_bytes == 0
    assert stream.store.copied.bytes_out == 0
    assert torch.equal(loss, stream_loss(stream_of(), head, *arguments).detach())


def test_the_host_tier_holds_nothing_after_the_backward_pass():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    stream = stream_of(offloading=True)
    for _ in range(3):
        resting = stream.store.empty(x.shape, x.dtype).copy_(x).requires_grad_()
        stream_loss(stream, head, resting, labels, mask).backward()
        del resting
        assert stream.store.pool.used_bytes == 0
    assert stream.store.pool.num_slabs == 3


def test_the_residual_stream_is_not_written_to():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    originals = [t.clone() for t in (x, labels, mask)]
    run(streamed(stream_of()), head, x, labels, mask)
    leaf = x.requires_grad_()
    stream_loss(stream_of(), head, leaf, labels, mask).backward()
    assert all(torch.equal(t, original) for t, original in zip((leaf, labels, mask), originals, strict=True))


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1 / 60), (torch.float16, 2.0**16 / 60)])
def test_half_precision_errs_like_plain_half_precision(dtype, scale):
    head, (x, labels, mask) = Head(dtype), inputs(dtype=dtype)
    half = [run(f, head, x, labels, mask, scale) for f in (streamed(stream_of()), plain_loss)]
    truth = run(plain_loss, head.double(), x.double(), labels, mask, scale)
    for error, allowed in zip(*(errors(result, truth) for result in half), strict=True):
        assert error <= 1.5 * allowed + 1e-6


def test_small_loss_scales_do_not_underflow_in_fp16():
    head, (x, labels, mask) = Head(torch.float16), inputs(dtype=torch.float16)
    scale = 1e-4
    got = run(streamed(stream_of()), head, x, labels, mask, scale)
    want = run(plain_loss, head.double(), x.double(), labels, mask, scale)
    assert max(errors(got, want)) < 0.02


def test_one_label_for_sixty_thousand_tokens_does_not_overflow_in_fp16():
    """The mean's gradient is about one, the sum's is above the largest fp16 number, 65504."""
    head, (x, labels, mask) = Head(torch.float16, classes=4), inputs(70_000, 1, torch.float16, classes=1)
    x = x[:1].expand_as(x).contiguous()
    scale = 1 / len(x)
    got = run(streamed(stream_of(2**17)), head, x, labels, torch.ones_like(mask), scale)
    want = run(plain_loss, head.double(), x.double(), labels, torch.ones_like(mask), scale)
    assert all(t.isfinite().all() for t in got)
    assert max(errors(got[:3], want[:3])) < 0.02, "loss, dx, dW"


def test_a_tied_weight_gets_a_plain_gradient_of_its_own_dtype():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        head, arguments = Head(dtype), inputs(dtype=dtype)
        loss, *gradients = run(streamed(stream_of()), head, *arguments)
        assert {g.dtype for g in gradients} == {dtype}
        assert loss.dtype == torch.promote_types(dtype, torch.float32)


def test_a_frozen_output_layer_gets_no_gradient():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    _, want, *_ = run(plain_loss, head, x, labels, mask)
    head.zero_grad()
    head.output_layer.weight.requires_grad_(False)
    x.requires_grad_()
    stream_loss(stream_of(), head, x, labels, mask).backward()
    assert head.output_layer.weight.grad is None
    assert max(errors([x.grad], [want])) < 1e-13


def test_a_frozen_norm_gets_no_gradient():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    _, want, *_ = run(plain_loss, head, x, labels, mask)
    head.zero_grad()
    head.final_layernorm.requires_grad_(False)
    x.requires_grad_()
    stream_loss(stream_of(), head, x, labels, mask).backward()
    assert head.final_layernorm.weight.grad is None
    assert max(errors([x.grad], [want])) < 1e-13


def test_a_second_backward_pass_never_loses_gradients_in_silence():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    loss = stream_loss(stream_of(), head, x.requires_grad_(), labels, mask)
    loss.backward(retain_graph=True)
    first = head.output_layer.weight.grad.clone()
    try:
        loss.backward()
    except RuntimeError:
        return
    assert torch.allclose(head.output_layer.weight.grad, 2 * first)


def test_token_losses_are_left_only_where_they_are_asked_for_without_gradients():
    head, (x, labels, mask) = Head(torch.float64), inputs()
    noted = []
    observer = Observer()
    observer.note_token_losses = noted.append
    stream = replace(stream_of(), observer=observer)
    run(streamed(stream), head, x, labels, mask)
    assert noted == []
    with torch.no_grad():
        loss = stream_loss(stream, head, x, labels, mask)
    losses = torch.cat(noted)
    assert len(losses) == labels.numel()
    torch.testing.assert_close(losses.sum(), loss)
    assert not losses[mask.T.flatten() == 0].any()
