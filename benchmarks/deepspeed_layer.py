"""DeepSpeed's own FPDT attention layer, called as in Megatron-DeepSpeed.

`deepspeed.sequence.fpdt_layer.FPDT_Attention` with offloading, under reentrant activation checkpointing, on one rank:
QKV projection with bias, causal attention, output projection. It gets neither the norm nor the rotary embedding that
this repository's block has, so it does a little less work.

It calls `_flash_attn_forward` and `_flash_attn_backward` of the package flash-attn, version 2. Where that is not
installed, torch's built-in FlashAttention-2 replaces it, behind the same two signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.block import NO_VOCABULARY, GraphContestant, random_
from benchmarks.common import Geometry, compute_dtype
from megatron.core.documents import Mask
from megatron.ops.attention import (
    QKV,
    AttentionBackend,
    AttentionOutput,
    AttentionRequest,
    AttentionVariant,
    KernelVariant,
    choose_backend,
)
from megatron.planner.flops import model_flops

FLASH_ATTENTION_2_7 = "2.7.0"  # from this version on DeepSpeed calls the signatures below


class DeepSpeedAttention(GraphContestant):
    """FPDT_Attention with its weights."""

    def __init__(self, geometry: Geometry, length: int, chunk: int, device: torch.device) -> None:
        fpdt_layer = load_fpdt_layer(device)
        config, dtype = replace(geometry.model_config(length), ffn_hidden_size=0), compute_dtype(device)
        q_width = config.num_attention_heads * config.kv_channels
        rows = q_width + 2 * config.num_key_value_heads * config.kv_channels
        new = partial(torch.empty, device=device, dtype=dtype)
        qkv, out = new(rows, config.hidden_size).normal_(std=0.02), new(config.hidden_size, q_width).normal_(std=0.02)
        bias = new(rows).zero_()
        weights = [t.requires_grad_() for t in (qkv, bias, out)]
        layer = fpdt_layer.FPDT_Attention(
            config, qkv, bias, out, None, dist.group.WORLD, return_bias=True, chunk_size=chunk, enable_offloading=True
        )
        shape = (length, 1, config.hidden_size)

        def run(x: Tensor) -> Tensor:
            return checkpoint(lambda x: layer(x, None, None, None)[0], x, use_reentrant=True)

        dy = random_(new(shape), device)
        super().__init__(run, weights, lambda: torch.randn(shape, device=device, dtype=dtype), dy)
        self.weight_bytes = sum(w.nbytes for w in weights)
        self.num_blocks = 1
        self.gradient_bytes = (qkv.numel() + bias.numel()) * 4 + out.nbytes  # DeepSpeed sums the first two in fp32
        self.model_flops = model_flops(config, NO_VOCABULARY, length)

    def host_bytes(self) -> tuple[int, int] | None:
        return None


def load_fpdt_layer(device: torch.device) -> Any:
    """Import DeepSpeed's module, start its process group of one rank, and replace flash-attn where it is missing."""
    import deepspeed
    from deepspeed.sequence import fpdt_layer
    from packaging import version

    if not dist.is_initialized():
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device_id)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for a minute on a CPU
    deepspeed.init_distributed(auto_mpi_discovery=False)
    if fpdt_layer._flash_attn_forward is None:
        name = "torch-flash" if device.type == "cuda" else "torch-cpu"
        request = AttentionRequest(device, compute_dtype(device), 128, (AttentionVariant(128**-0.5),))
        kernel = choose_backend(name, request)
        fpdt_layer._flash_attn_forward, fpdt_layer._flash_attn_backward = flash_attention_2(kernel)
        fpdt_layer.flash_attn_version = version.parse(FLASH_ATTENTION_2_7)
    return fpdt_layer


def kernel_name(device: torch.device) -> str:
    """Return the name of the FlashAttention-2 kernel that DeepSpeed's layer calls."""
    is_replaced = load_fpdt_layer(device)._flash_attn_forward.__module__ == __name__
    return "torch-flash" if is_replaced else "flash-attn-2"


def flash_attention_2(backend: AttentionBackend) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Implement flash-attn's `_flash_attn_forward` and `_flash_attn_backward` (2.7 and later) with another backend.

    Tensors are [B, S, H, D]. flash-attn writes gradients into the caller's tensors; here the gradients
    become the storage of those tensors, so nothing is copied and no memory is used twice.
    """

    def forward(*args: Any, causal: bool, **others: Any) -> tuple[Tensor, Tensor, None, None]:
        q, k, v, _dropout_p, softmax_scale = args
        qkv = QKV(*(t.transpose(0, 1) for t in (q, k, v)))
        out, lse = backend.forward(qkv, KernelVariant(softmax_scale, Mask.CAUSAL if causal else Mask.FULL))
        return out.transpose(0, 1), lse, None, None

    def backward(*args: Any, rng_state: Any = None) -> None:
        dout, q, k, v, out, softmax_lse, dq, dk, dv, _dropout_p, softmax_scale, causal, *_others = args
        for unused in (dq, dk, dv):
            unused.data = unused.new_empty(0)
        dout, q, k, v, out = (t.transpose(0, 1) for t in (dout, q, k, v, out))
        variant = KernelVariant(softmax_scale, Mask.CAUSAL if causal else Mask.FULL)
        gradients = backend.backward(dout, QKV(q, k, v), AttentionOutput(out, softmax_lse), variant)
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.data = gradient.transpose(0, 1)

    return forward, backward
