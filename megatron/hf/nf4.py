"""Frozen weights in NF4, the 4-bit format of QLoRA (https://arxiv.org/abs/2305.14314), by bitsandbytes.

Each block of 64 numbers has a scale, its largest magnitude in fp32, and 16 levels, those of a normal distribution. The
scales are not quantized a second time, as is the default of bitsandbytes. One parameter of bytes holds a weight, so
that ZeRO-3 partitions and gathers it as it is stored:

    levels, half a byte per number, of all blocks | scales of all blocks        36 bytes per block
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Size, Tensor, nn

BLOCK = 64
BLOCK_BYTES = BLOCK // 2 + 4
_TYPE = "nf4"
# The formats that bitsandbytes dequantizes to.
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


class NF4Weight(nn.Module):
    """A weight in place of a parameter; every product dequantizes it (megatron.ops.linear.QuantizedWeight)."""

    def __init__(self, parameter: Tensor) -> None:
        """Hold bytes for a parameter of this shape, on its device; their values come later."""
        super().__init__()
        self.shape, self.dtype = parameter.shape, parameter.dtype
        num_bytes = stored_bytes(parameter.numel())
        self.quantized = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device=parameter.device), False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a new tensor."""
        return dequantize(self.quantized.detach(), self.shape, dtype)


def stored_bytes(num_weights: int) -> int:
    """Return the bytes of a weight in NF4."""
    return BLOCK_BYTES * ceil(num_weights / BLOCK)


def quantize(weight: Tensor) -> Tensor:
    """Return a weight of any shape in NF4: uint8 [stored_bytes]. It is rounded to nearest, the same on every rank."""
    from bitsandbytes import functional

    values = weight if weight.dtype in _FORMATS else weight.float()
    levels, state = functional.quantize_4bit(values.contiguous(), blocksize=BLOCK, quant_type=_TYPE)
    num_blocks = ceil(weight.numel() / BLOCK)
    stored = levels.new_zeros(stored_bytes(weight.numel()))
    stored[: levels.numel()] = levels.flatten()
    stored[num_blocks * BLOCK // 2 :] = state.absmax.contiguous().view(torch.uint8)
    return stored


def dequantize(stored: Tensor, shape: Size, dtype: torch.dtype) -> Tensor:
    """Return a weight from `quantize`'s result."""
    if stored.is_meta:
        return torch.empty(shape, dtype=dtype, device=stored.device)
    from bitsandbytes import functional

    num_weights = shape.numel()
    levels, scales = stored[: (num_weights + 1) // 2], stored[ceil(num_weights / BLOCK) * BLOCK // 2 :]
    own = dtype if dtype in _FORMATS else torch.float32
    state = functional.QuantState(scales.view(torch.float32), shape, blocksize=BLOCK, quant_type=_TYPE, dtype=own)
    result: Tensor = functional.dequantize_4bit(levels[:, None], state)
    return result.to(dtype)
