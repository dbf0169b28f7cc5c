"""Limits that the CUDA kernels of several backends share: device, dtype, head size and number of elements."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.attention.protocol import AttentionUnavailable


def cuda_refusal(
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    minimum_capability: tuple[int, int],
    largest_head: int,
    newest_major: int | None = None,
    head_multiple: int = 8,
) -> str | None:
    """Return why a bf16 and fp16 kernel for multiples of `head_multiple` cannot serve, or None if it can."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < minimum_capability:
        return f"it needs compute capability {minimum_capability[0]}.{minimum_capability[1]} or later"
    if newest_major is not None and capability[0] > newest_major:
        return f"it needs compute capability {newest_major}.x or earlier, and this device has {capability[0]}.x"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, and the tensors are {dtype}"
    if head_size % head_multiple or not 0 < head_size <= largest_head:
        return f"head size {head_size} is not a multiple of {head_multiple} up to {largest_head}"
    return None


def refuse_more_than_31_bits_count(name: str, q_SBHD: Tensor) -> None:
    """Raise AttentionUnavailable if q, padded to blocks, has 2^31 elements or more: the kernel's backward is wrong.

    On an H200, cuDNN 9.19 gave wrong gradients for the last eight tokens of every sequence. FlashAttention-2, which
    indexes dq of a sequence with 32 bits, gave wrong gradients or an illegal address.
    """
    S, B, H, D = q_SBHD.shape
    block = 32 if D <= 128 else 64
    num_elements = -(-S // 128) * 128 * B * H * (-(-D // block) * block)
    if num_elements >= 2**31:
        raise AttentionUnavailable(
            f"--attention-backend {name}: {S} tokens x {B} sequences x {H} heads of {D} are {num_elements} elements "
            "once padded, and its backward counts to 2^31; use more sequence-parallel ranks, a smaller "
            "--micro-batch-size or FPDT with a smaller chunk, or another backend."
        )
