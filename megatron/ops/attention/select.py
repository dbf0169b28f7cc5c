"""Choice of an attention backend: `auto` takes the fastest that is correct, a name forces one or says why not."""

from __future__ import annotations

import torch

from megatron.ops.attention.protocol import AttentionBackend, AttentionUnavailable
from megatron.ops.attention.reference import ReferenceAttention
from megatron.ops.attention.torch_backends import CudnnAttention, TorchCpuAttention, TorchFlashAttention

# Fastest first; the reference, which serves everything, last.
BACKENDS: tuple[AttentionBackend, ...] = (
    CudnnAttention(),
    TorchFlashAttention(),
    TorchCpuAttention(),
    ReferenceAttention(),
)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> AttentionBackend:
    """Return the backend called `name`, or for "auto" the fastest one that can serve.

    Raises AttentionUnavailable for an unknown name and for a backend that cannot serve such tensors.
    """
    refusals = {backend.name: backend.refusal(device, dtype, head_size) for backend in BACKENDS}
    usable = [backend for backend in BACKENDS if refusals[backend.name] is None]
    if name == "auto":
        return usable[0]
    for backend in usable:
        if backend.name == name:
            return backend
    alternatives = ", ".join(["auto", *(backend.name for backend in usable)])
    reason = refusals.get(name, "there is no such backend")
    raise AttentionUnavailable(f"--attention-backend {name}: {reason}; use one of {alternatives}.")
