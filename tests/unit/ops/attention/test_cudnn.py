"""The cuDNN backend over stand-ins that compute on the CPU and refuse what cuDNN refuses."""

from types import SimpleNamespace

import pytest
import torch

from megatron.ops.attention import AttentionVariant, torch_backends
from megatron.ops.attention.torch_backends import CudnnAttention, TorchCpuAttention
from tests.unit.ops.attention.test_cpu_backends import (
    ALL_MASKS,
    ROWS,
    draw,
    draw_row,
    errors,
    row_mask,
    row_of_two_tiles,
    tiled,
    truth,
)


def refuse_one_token(q, k):
    if 1 in (q.shape[2], k.shape[2]):
        raise RuntimeError("No valid execution plans built.")


def cudnn_forward(q, k, v, bias, with_lse, dropout, causal, debug, scale):
    refuse_one_token(q, k)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
    return o, lse.unsqueeze(-1)


def cudnn_backward(
    do, q, k, v, o, lse, seed, offset, bias, starts_q, starts_k, max_q, max_k, dropout, causal, scale
):  # fmt: skip
    refuse_one_token(q, k)
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(do, q, k, v, o, lse.squeeze(-1), dropout, causal, scale=scale)


@pytest.fixture
def cudnn(monkeypatch):
    """The backend, as it would run where there is no GPU."""
    kernels = SimpleNamespace(
        _scaled_dot_product_cudnn_attention=cudnn_forward,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
        _scaled_dot_product_flash_attention_for_cpu=torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        _scaled_dot_product_flash_attention_for_cpu_backward=(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        ),
    )
    monkeypatch.setattr(torch_backends, "aten", kernels)
    monkeypatch.setattr(CudnnAttention, "others", TorchCpuAttention())
    return CudnnAttention()


@pytest.mark.parametrize("lengths", [[8, 8, 1], [1, 8], [1, 1], [8, 5]])
def test_tiles_of_one_token_go_to_another_kernel(cudnn, lengths):
    tensors = draw((2, lengths, 4, 2, 8))
    assert max(errors(tiled(cudnn, *tensors, 0.3, lengths), truth(*tensors, 0.3))) < 1e-13


@pytest.mark.parametrize("lengths", [[8, 8], [8, 5]])
def test_longer_tiles_do_not(cudnn, monkeypatch, lengths):
    monkeypatch.setattr(CudnnAttention, "others", None)
    tensors = draw((2, lengths, 4, 2, 8))
    assert max(errors(tiled(cudnn, *tensors, 0.3, lengths), truth(*tensors, 0.3))) < 1e-13


@ALL_MASKS
def test_masks_are_the_definition_in_fp64(cudnn, region):
    shape = ROWS["gqa, head size 192, batch of 2"]
    tensors = draw_row(shape)
    got = row_of_two_tiles(cudnn, *tensors, AttentionVariant(0.3), region)
    assert max(errors(got, truth(*tensors, 0.3, mask=row_mask(region, shape)))) < 1e-13
