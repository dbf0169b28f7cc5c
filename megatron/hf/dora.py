"""DoRA of peft in a streamed layer."""

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn


class StreamedDora(DoraLinearLayer):
    """peft's DoRA with the product B A outside of the tape, which would skip it: autograd does not see who reads it."""

    @torch.no_grad()
    def get_lora_weight(self, lora_A: nn.Linear, lora_B: nn.Linear, adapter_name: str | None = None) -> Tensor:
        weight: Tensor = lora_B.weight @ lora_A.weight
        return weight
