"""The attention kernels that come with torch, called through its aten operators (torch 2.8 to 2.13).

torch's FlashAttention-2 reads itself whether its backward must be deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.documents import Mask
from megatron.ops.attention.cuda_limits import CudaLimits, refuse_more_than_31_bits_count
from megatron.ops.attention.protocol import (
    NO_SOFTCAP,
    QKV,
    AttentionOutput,
    AttentionRequest,
    KernelVariant,
    PackedSequences,
)

aten = torch.ops.aten


class TorchCpuAttention:
    """torch's flash kernel for CPUs: fp32, fp64, bf16; supports grouped key/value heads (GQA).

    The mask UPPER is CAUSAL in reverse: j >= i where n-1-j <= n-1-i.
    """

    name = "torch-cpu"
    has_windows = False

    def refusal(self, request: AttentionRequest) -> str | None:
        kind = request.device.type
        if kind != "cpu":
            return f"it runs on CPUs, and the tensors are on {kind}"
        return NO_SOFTCAP if request.has_softcap else None

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        if variant.mask is Mask.UPPER:
            o, lse = self.forward(_reversed(qkv), variant._replace(mask=Mask.CAUSAL))
            return AttentionOutput(o.flip(0), lse.flip(2))
        q, k, v = (_heads_first(t) for t in qkv)
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, variant.is_causal, scale=variant.scale)
        return AttentionOutput(_sequence_first(o), lse)

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        if variant.mask is Mask.UPPER:
            output = AttentionOutput(output.o.flip(0), output.lse.flip(2))
            grads = self.backward(do.flip(0), _reversed(qkv), output, variant._replace(mask=Mask.CAUSAL))
            return _reversed(grads)
        do, q, k, v, o = (_heads_first(t) for t in (do, *qkv, output.o))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, output.lse, 0.0, variant.is_causal, scale=variant.scale
        )
        dq, dk, dv = (_sequence_first(t) for t in grads)
        return dq, dk, dv


class TorchFlashAttention:
    """FlashAttention-2 as compiled into torch: bf16 and fp16 on Ampere and later."""

    name = "torch-flash"
    has_windows = True

    def refusal(self, request: AttentionRequest) -> str | None:
        return CudaLimits(minimum_capability=(8, 0), largest_head=256).refusal(request)

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        refuse_more_than_31_bits_count(self.name, qkv.q)
        q, k, v = (t.transpose(0, 1) for t in qkv)  # [S, B, H, D] -> [B, S, H, D]
        out = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, variant.is_causal, False, scale=variant.scale,
            window_size_left=variant.keys_before,
        )  # fmt: skip
        return AttentionOutput(out[0].transpose(0, 1), out[1])

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (t.transpose(0, 1) for t in (do, *qkv, output.o))
        # Without dropout the kernel does not read the random state.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._flash_attention_backward(
            do, q, k, v, o, output.lse, None, None, q.shape[1], k.shape[1], 0.0, variant.is_causal, unused, unused,
            scale=variant.scale, window_size_left=variant.keys_before,
        )  # fmt: skip
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)

    def forward_packed(self, qkv: QKV, packed: PackedSequences, variant: KernelVariant) -> AttentionOutput:
        starts, longest = packed
        out = aten._flash_attention_forward(
            *qkv, starts, starts, longest, longest, 0.0, variant.is_causal, False, scale=variant.scale,
            window_size_left=variant.keys_before,
        )  # fmt: skip
        return AttentionOutput(out[0], out[1])

    def backward_packed(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, packed: PackedSequences, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        starts, longest = packed
        unused = torch.empty(2, dtype=torch.uint64, device=do.device)
        grads = aten._flash_attention_backward(
            do, *qkv, *output, starts, starts, longest, longest, 0.0, variant.is_causal, unused, unused,
            scale=variant.scale, window_size_left=variant.keys_before,
        )  # fmt: skip
        return grads[0], grads[1], grads[2]


class CudnnAttention:
    """cuDNN's fused attention through torch: bf16 and fp16 on Hopper and later; supports GQA.

    Some versions of cuDNN refuse tiles of one query or one key. Those go to torch's FlashAttention-2, as in torch
    itself, and so do tiles with the mask UPPER; it serves whatever cuDNN serves.
    """

    name = "cudnn"
    has_windows = False
    others = TorchFlashAttention()

    def refusal(self, request: AttentionRequest) -> str | None:
        reason = CudaLimits(minimum_capability=(9, 0), largest_head=128).refusal(request)
        if reason is None and request.deterministic:
            return "through torch it lacks the deterministic backward that --deterministic-mode needs"
        return reason

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        if self._leaves_to_others(qkv, variant):
            return self.others.forward(qkv, variant)
        refuse_more_than_31_bits_count(self.name, qkv.q)
        q, k, v = (_heads_first(t) for t in qkv)
        out = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, variant.is_causal, False, scale=variant.scale
        )
        return AttentionOutput(_sequence_first(out[0]), out[1].view(q.shape[:3]))

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._leaves_to_others(qkv, variant):
            return self.others.backward(do, qkv, output, variant)
        do, q, k, v, o = (_heads_first(t) for t in (do, *qkv, output.o))
        # Without dropout the kernel does not read the random state.
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, output.lse.unsqueeze(-1), unused, unused, None, None, None,
            q.shape[2], k.shape[2], 0.0, variant.is_causal, scale=variant.scale,
        )  # fmt: skip
        dq, dk, dv = (_sequence_first(t) for t in grads)
        return dq, dk, dv

    def _leaves_to_others(self, qkv: QKV, variant: KernelVariant) -> bool:
        return len(qkv.q) == 1 or len(qkv.k) == 1 or variant.mask is Mask.UPPER


def _reversed(tensors: tuple[Tensor, Tensor, Tensor]) -> QKV:
    return QKV(*(t.flip(0) for t in tensors))


def _heads_first(t_SBHD: Tensor) -> Tensor:
    return t_SBHD.permute(1, 2, 0, 3)  # [S, B, H, D] -> [B, H, S, D]


def _sequence_first(t_BHSD: Tensor) -> Tensor:
    return t_BHSD.permute(2, 0, 1, 3)  # [B, H, S, D] -> [S, B, H, D]
