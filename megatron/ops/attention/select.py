"""Choice of an attention backend: `auto` takes the fastest correct one; a name forces one or raises with the reason."""

from __future__ import annotations

from megatron.ops.attention.flash_attn_packages import FlashAttention2, FlashAttention3, FlashAttention4
from megatron.ops.attention.protocol import AttentionBackend, AttentionRequest, AttentionUnavailable
from megatron.ops.attention.reference import ReferenceAttention
from megatron.ops.attention.torch_backends import CudnnAttention, TorchCpuAttention, TorchFlashAttention

# Fastest first; the reference, which serves everything, last.
BACKENDS: tuple[AttentionBackend, ...] = (
    FlashAttention4(),
    FlashAttention3(),
    CudnnAttention(),
    FlashAttention2(),
    TorchFlashAttention(),
    TorchCpuAttention(),
    ReferenceAttention(),
)

# Names of families of backends; the fastest member that can serve is taken.
FAMILIES = {
    "auto": tuple(backend.name for backend in BACKENDS),
    "flash-2": ("flash-attn-2", "torch-flash"),
}

# Backends for few queries over many keys, fastest first. FlashAttention-2's kernel splits the keys among thread blocks
# (split-KV). The other GPU kernels have one block per query head or group of heads, which leaves most SMs idle.
FOR_FEW_QUERIES: tuple[AttentionBackend, ...] = (TorchFlashAttention(), TorchCpuAttention(), ReferenceAttention())

# On an H200, cuDNN 9.19 crashed the process in its backward on documents of few tokens.
NOT_FOR_SHORT_TILES = {
    "cudnn": "its backward crashes on short tiles, of documents (--reset-attention-mask), of windows or of rows that "
    "ranks share"
}


def choose_backend(name: str, request: AttentionRequest, short_tiles: bool = False) -> AttentionBackend:
    """Return the backend called `name`, or the fastest of a family ("auto", "flash-2") that can serve.

    It must serve all variants of the request and, with `short_tiles`, tiles of any length. Raises AttentionUnavailable
    for an unknown name and for a backend that cannot serve the request.
    """

    def refusal_of(backend: AttentionBackend) -> str | None:
        reason = NOT_FOR_SHORT_TILES.get(backend.name) if short_tiles or request.has_short_tiles else None
        return reason or backend.refusal(request)

    names = FAMILIES.get(name, (name,))
    refusals: dict[str, str] = {}
    for backend in (backend for backend in BACKENDS if backend.name in names):
        refusal = refusal_of(backend)
        if refusal is None:
            return backend
        refusals[backend.name] = refusal
    reasons = [f"{member}: {refusal}" for member, refusal in refusals.items()]
    reason = refusals.get(name) or "; ".join(reasons) or "there is no such backend"
    usable = [backend.name for backend in BACKENDS if refusal_of(backend) is None]
    alternatives = ", ".join(["auto", *usable])
    raise AttentionUnavailable(f"--attention-backend {name}: {reason}; use one of {alternatives}.")


def choose_backend_for_few_queries(request: AttentionRequest) -> AttentionBackend:
    """Return the fastest backend for tiles of any length that have few queries."""
    return next(backend for backend in FOR_FEW_QUERIES if backend.refusal(request) is None)
