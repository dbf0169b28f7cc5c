"""The attention kernels that come with torch, called through its aten operators (torch 2.8 to 2.13).

Their `is_causal` aligns the mask's triangle at the top left, which suits square tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.attention.cuda_limits import cuda_refusal, refuse_more_than_31_bits_count

aten = torch.ops.aten


class TorchCpuAttention:
    """torch's flash kernel for CPUs: fp32, fp64, bf16; supports grouped key/value heads (GQA)."""

    name = "torch-cpu"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        return None if device.type == "cpu" else f"it runs on CPUs, and the tensors are on {device.type}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_heads_first(t) for t in (q, k, v))
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return _sequence_first(o), lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (_heads_first(t) for t in (do, q, k, v, o))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)
        dq, dk, dv = (_sequence_first(t) for t in grads)
        return dq, dk, dv


class TorchFlashAttention:
    """FlashAttention-2 as compiled into torch: bf16 and fp16 on Ampere and later."""

    name = "torch-flash"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        return cuda_refusal(device, dtype, head_size, minimum_capability=(8, 0), largest_head=256)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        refuse_more_than_31_bits_count(self.name, q)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # [S, B, H, D] -> [B, S, H, D]
        out = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out[0].transpose(0, 1), out[1]

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (t.transpose(0, 1) for t in (do, q, k, v, o))
        # Without dropout the kernel does not read the random state.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._flash_attention_backward(
            do, q, k, v, o, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused, scale=scale
        )
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        out = aten._flash_attention_forward(
            q, k, v, boundaries, boundaries, longest, longest, 0.0, True, False, scale=scale
        )
        return out[0], out[1]

    def backward_packed(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        boundaries: Tensor,
        longest: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            do, q, k, v, o, lse, boundaries, boundaries, longest, longest, 0.0, True, unused, unused, scale=scale
        )
        return grads[0], grads[1], grads[2]


class CudnnAttention:
    """cuDNN's fused attention through torch: bf16 and fp16 on Hopper and later; supports GQA.

    Some versions of cuDNN refuse tiles of one query or one key. Those go to torch's FlashAttention-2, as in torch
    itself; it serves whatever cuDNN serves.
    """

    name = "cudnn"
    one_token = TorchFlashAttention()

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        return cuda_refusal(device, dtype, head_size, minimum_capability=(9, 0), largest_head=128)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        if _has_one_token(q, k):
            return self.one_token.forward(q, k, v, causal, scale)
        refuse_more_than_31_bits_count(self.name, q)
        q, k, v = (_heads_first(t) for t in (q, k, v))
        out = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return _sequence_first(out[0]), out[1].view(q.shape[:3])

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _has_one_token(q, k):
            return self.one_token.backward(do, q, k, v, o, lse, causal, scale)
        do, q, k, v, o = (_heads_first(t) for t in (do, q, k, v, o))
        # Without dropout the kernel does not read the random state.
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse.unsqueeze(-1), unused, unused, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip
        dq, dk, dv = (_sequence_first(t) for t in grads)
        return dq, dk, dv


def _has_one_token(q_SBHD: Tensor, k_SBKD: Tensor) -> bool:
    return len(q_SBHD) == 1 or len(k_SBKD) == 1


def _heads_first(t_SBHD: Tensor) -> Tensor:
    return t_SBHD.permute(1, 2, 0, 3)  # [S, B, H, D] -> [B, H, S, D]


def _sequence_first(t_BHSD: Tensor) -> Tensor:
    return t_BHSD.permute(2, 0, 1, 3)  # [B, H, S, D] -> [S, B, H, D]
