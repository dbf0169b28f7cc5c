"""DoRA of peft in a streamed layer."""

from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from megatron.hf.nf4 import NF4Weight


class StreamedDora(DoraLinearLayer):
    """peft's DoRA with the product B A outside of the tape, which would skip it: autograd does not see who reads it."""

    @torch.no_grad()
    def get_lora_weight(self, lora_A: nn.Linear, lora_B: nn.Linear, adapter_name: str | None = None) -> Tensor:
        weight: Tensor = lora_B.weight @ lora_A.weight
        return weight

    def forward(self, x: Tensor, *, base_layer: Any, **others: Any) -> Tensor:
        if isinstance(base_layer.weight, NF4Weight):  # peft knows those of bitsandbytes alone
            base_layer = SimpleNamespace(weight=base_layer.weight.dequantized(x.dtype), bias=base_layer.bias)
        result: Tensor = super().forward(x, base_layer=base_layer, **others)
        return result
