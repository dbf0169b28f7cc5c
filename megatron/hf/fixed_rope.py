"""RoPE that follows the largest position of a sequence (dynamic NTK, longrope), fixed for one length.

transformers computes its frequencies again in each call, from the positions that the call sees. A slice sees its own
positions only. So the frequencies of the whole sequence are computed once, by the model's own code, and stay. A RoPE
that reads the largest position elsewhere, too, is given the last one in each call. With packed documents the length is
that of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FOLLOWING = ("dynamic", "longrope")
FIXED = "default"  # a name under which transformers leaves frequencies alone

RotaryForward = Callable[..., tuple[Tensor, Tensor]]


@torch.no_grad()
def fix_rope(model: nn.Module, seq_length: int) -> None:
    """Fix the RoPE of a model for sequences of this length."""
    ropes: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    for rope in ropes:
        kinds = rope.rope_type
        if isinstance(kinds, str) and kinds in FOLLOWING:
            whole = _cos_and_sin(rope, [0, seq_length - 1])
            rope.rope_type = FIXED
            if not torch.equal(whole[:, :, :1], _cos_and_sin(rope, [0])):
                rope.forward = partial(_with_last_position, rope.forward, seq_length - 1)
        elif isinstance(kinds, dict):
            for layer_type in [name for name, kind in kinds.items() if kind in FOLLOWING]:
                _cos_and_sin(rope, [0, seq_length - 1], layer_type=layer_type)
                kinds[layer_type] = FIXED


def _cos_and_sin(rope: nn.Module, positions: Sequence[int], **of_layer: str) -> Tensor:
    """Run a RoPE module, which updates its frequencies; return [2, 1, S, D]."""
    buffer = next(rope.buffers())
    return torch.stack(rope(buffer.new_zeros(1, 1, 1), torch.tensor([positions], device=buffer.device), **of_layer))


def _with_last_position(forward: RotaryForward, last: int, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
    """Run a RoPE module on some positions and the last one of the sequence; return cos and sin of the former."""
    if position_ids.is_meta:  # a comparison with the largest position needs values
        one = forward(torch.zeros(1, 1, 1, dtype=x.dtype), torch.tensor([[last]]))
        return tuple(each.to(position_ids.device).expand(*position_ids.shape, -1) for each in one)
    positions = functional.pad(position_ids, (0, 1), value=last)
    return tuple(each[:, :-1] for each in forward(x, positions))
