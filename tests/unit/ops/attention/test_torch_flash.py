"""torch's FlashAttention-2 over stand-ins that compute on the CPU what their window says."""

from types import SimpleNamespace

import pytest
import torch

from megatron.ops.attention import AttentionVariant, torch_backends
from megatron.ops.attention.torch_backends import TorchFlashAttention
from tests.unit.ops.attention.fake_flash_attn import UNBOUNDED, attend, differentiate, variant_of
from tests.unit.ops.attention.test_cpu_backends import (
    ALL_MASKS,
    ALL_ROWS,
    draw_row,
    errors,
    row_mask,
    row_of_two_tiles,
    truth,
)

aten = torch.ops.aten


def variant_of_call(causal, scale, window_size_left=None, window_size_right=None):
    window = tuple(UNBOUNDED if side is None else side for side in (window_size_left, window_size_right))
    return variant_of(scale, causal, window)


def forward(q, k, v, starts_q, starts_k, max_q, max_k, dropout, causal, debug, **options):
    assert (starts_q, starts_k, max_q, max_k, dropout, debug) == (None, None, q.shape[1], k.shape[1], 0.0, False)
    return *attend(q, k, v, variant_of_call(causal, **options)), None, None, None


def backward(do, q, k, v, o, lse, starts_q, starts_k, max_q, max_k, dropout, causal, seed, offset, **options):
    assert (starts_q, starts_k, max_q, max_k, dropout) == (None, None, q.shape[1], k.shape[1], 0.0)
    gradients = [torch.empty_like(t) for t in (q, k, v)]
    differentiate(do, q, k, v, o, lse.contiguous(), *gradients, variant_of_call(causal, **options))
    return gradients


@pytest.mark.parametrize("operator", [aten._flash_attention_forward, aten._flash_attention_backward], ids=str)
def test_the_operators_take_windows(operator):
    names = [argument.name for argument in operator.default._schema.arguments if argument.kwarg_only]
    assert names[:3] == ["scale", "window_size_left", "window_size_right"]


@ALL_ROWS
@ALL_MASKS
def test_masks_are_the_definition_in_fp64(monkeypatch, region, shape):
    kernels = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    monkeypatch.setattr(torch_backends, "aten", kernels)
    tensors = draw_row(shape)
    got = row_of_two_tiles(TorchFlashAttention(), *tensors, AttentionVariant(0.3), region)
    assert max(errors(got, truth(*tensors, 0.3, mask=row_mask(region, shape)))) < 1e-13
