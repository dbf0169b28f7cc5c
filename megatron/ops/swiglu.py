"""SwiGLU (arXiv 2002.05202): silu(gate) * up, gate and up stacked in one tensor or in two.

dup = dy silu(gate)        dgate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.fused import fused


def swiglu(gate_and_up_SBf: Tensor) -> Tensor:
    """Compute [S, B, 2f], the gate first -> [S, B, f]."""
    return _SwiGLU.apply(gate_and_up_SBf)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up of two tensors of one shape."""
    return _GatedSiLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return _forward(gate_and_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        result = torch.empty_like(gate_and_up)
        _backward(gate_and_up, grads[0], *result.chunk(2, -1))
        return result


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _gradients(gate, up, grads[0], dgate, dup)
        return dgate, dup


@fused
def _forward(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


@fused
def _backward(gate_and_up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write both halves in one pass: concatenated by the compiler, they would take two."""
    gate, up = gate_and_up.chunk(2, -1)
    _write_gradients(gate, up, dy, dgate, dup)


@fused
def _product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@fused
def _gradients(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor) -> None:
    _write_gradients(gate, up, dy, dgate, dup)


def _write_gradients(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor) -> None:
    gate, up, dy = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (gate, up, dy))
    sigmoid = torch.sigmoid(gate)
    dup.copy_(dy * gate * sigmoid)
    dgate.copy_(dy * up * sigmoid * (1 + gate * (1 - sigmoid)))
