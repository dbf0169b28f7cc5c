"""Limits that the CUDA kernels of several backends share: device, dtype, head size and number of elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.ops.attention.protocol import NO_SOFTCAP, AttentionRequest, AttentionUnavailable


@dataclass(frozen=True)
class CudaLimits:
    """The devices, head sizes and scores that a bf16 and fp16 kernel serves."""

    minimum_capability: tuple[int, int]
    largest_head: int
    newest_major: int | None = None
    head_multiple: int = 8
    softcap: bool = False

    def refusal(self, request: AttentionRequest) -> str | None:
        """Return why the kernel cannot serve the request, or None if it can."""
        minimum, newest, head_size = self.minimum_capability, self.newest_major, request.head_size
        if request.device.type != "cuda":
            return f"it runs on CUDA devices, and the tensors are on {request.device.type}"
        major, minor = capability(request.device)
        if (major, minor) < minimum:
            return f"it needs compute capability {minimum[0]}.{minimum[1]} or later"
        if newest is not None and major > newest:
            return f"it needs compute capability {newest}.x or earlier, and this device has {major}.x"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bf16 and fp16, and the tensors are {request.dtype}"
        if head_size % self.head_multiple or not 0 < head_size <= self.largest_head:
            return f"head size {head_size} is not a multiple of {self.head_multiple} up to {self.largest_head}"
        return None if self.softcap or not request.has_softcap else NO_SOFTCAP


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, (0, 0) for one without CUDA."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


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
