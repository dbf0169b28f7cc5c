"""Scores that grow with the position, as in Llama 4's layers without RoPE.

transformers' layer counts positions from the first token that it gets, which is right for whole sequences alone. Here
the layer leaves its queries as they are, and they are scaled by their true positions on their way to attention:

    q <- q (1 + weight log(1 + floor((position + 1) / step)))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class QueryScale(NamedTuple):
    """How queries grow with the position."""

    step: float
    weight: float

    def scaled(self, q_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Scale queries by their positions, in fp32 at least."""
        steps_BT = torch.floor((positions_BT.float() + 1.0) / self.step)
        scale_B1T1 = (torch.log1p(steps_BT) * self.weight + 1.0)[:, None, :, None]
        return (q_BHTD * scale_B1T1).to(q_BHTD.dtype)


def take_query_scale(layer: nn.Module) -> QueryScale | None:
    """Switch off the scaling of queries in a layer; return it, None if the layer has none."""
    module: Any
    for module in layer.modules():
        if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            module.attn_temperature_tuning = False
            return QueryScale(module.floor_scale, module.attn_scale)
    return None
