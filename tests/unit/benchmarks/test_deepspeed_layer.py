"""DeepSpeed's layer with the stand-in kernels computes attention, and its gradients, chunk by chunk."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import TINY_GEOMETRY, Geometry
from megatron.core.documents import Mask
from megatron.ops.attention import QKV, AttentionOutput, KernelVariant
from megatron.ops.attention.reference import ReferenceAttention

deepspeed_layer = pytest.importorskip("benchmarks.deepspeed_layer")

CPU = torch.device("cpu")
LENGTH = 96
GEOMETRY = Geometry(**TINY_GEOMETRY | {"num_key_value_heads": 4})


class _NoStream:
    """DeepSpeed's accelerator for CPUs has no streams, and its offloading asks for some."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def layer(monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed.accelerator import get_accelerator

    for name in ("Stream", "default_stream"):
        monkeypatch.setattr(type(get_accelerator()), name, _NoStream)
    had_group = dist.is_initialized()
    torch.manual_seed(0)
    yield lambda chunk: deepspeed_layer.DeepSpeedAttention(GEOMETRY, LENGTH, chunk, CPU)
    if not had_group and dist.is_initialized():
        dist.destroy_process_group()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        o, lse = ReferenceAttention().forward(QKV(q, k, v), KernelVariant(scale, Mask.CAUSAL))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        variant = KernelVariant(ctx.scale, Mask.CAUSAL)
        return *ReferenceAttention().backward(do, QKV(q, k, v), AttentionOutput(o, lse), variant), None


def _expected(weights, x, dy):
    qkv, bias, out = (w.detach().requires_grad_() for w in weights)
    heads, size = GEOMETRY.num_attention_heads, GEOMETRY.kv_channels
    q, k, v = (t.unflatten(2, (heads, size)) for t in (x @ qkv.T + bias).chunk(3, 2))
    y = _Attention.apply(q, k, v, size**-0.5).flatten(2) @ out.T
    return torch.autograd.grad(y, [qkv, bias, out], dy)


@pytest.mark.parametrize("chunk", [32, 48, 96], ids=["3 chunks, offloaded", "2 chunks, offloaded", "1 chunk"])
def test_gradients_are_those_of_plain_attention(layer, chunk):
    contestant = layer(chunk)
    x = torch.randn(LENGTH, 1, GEOMETRY.hidden_size)
    contestant._make_x = x.clone
    contestant.prepare()
    contestant.forward()
    contestant.backward()
    for weight, expected in zip(contestant._weights, _expected(contestant._weights, x, contestant._dy), strict=True):
        torch.testing.assert_close(weight.grad, expected, rtol=2e-4, atol=2e-4)


def test_flops_leave_out_the_mlp_that_the_layer_does_not_have(layer):
    h, S = GEOMETRY.hidden_size, LENGTH
    assert layer(96).model_flops == 3 * (2 * S * 4 * h * h + 2 * S**2 * h)


def test_the_kernel_is_named_after_what_serves(layer, monkeypatch):
    module = deepspeed_layer.load_fpdt_layer(CPU)
    assert deepspeed_layer.kernel_name(CPU) == "torch-flash"
    monkeypatch.setattr(module, "_flash_attn_forward", print)
    assert deepspeed_layer.kernel_name(CPU) == "flash-attn-2"


def test_gradients_take_the_place_of_the_zeros_they_were_given():
    _, backward = deepspeed_layer.flash_attention_2(ReferenceAttention())
    q, k, v, do = (torch.randn(1, 8, 2, 4) for _ in range(4))
    qkv, variant = QKV(*(t.transpose(0, 1) for t in (q, k, v))), KernelVariant(0.5, Mask.CAUSAL)
    o, lse = output = ReferenceAttention().forward(qkv, variant)
    dq, dk, dv = (torch.zeros_like(q) for _ in range(3))
    backward(do, q, k, v, o.transpose(0, 1), lse, dq, dk, dv, 0.0, 0.5, True, -1, -1, 0.0, None, False, rng_state=None)
    expected = ReferenceAttention().backward(do.transpose(0, 1), qkv, output, variant)
    for gradient, wanted in zip((dq, dk, dv), expected, strict=True):
        assert torch.equal(gradient, wanted.transpose(0, 1))
