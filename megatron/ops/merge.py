"""Online-softmax merge of two partial attention results of the same queries.

    o = (exp(lse_a) o_a + exp(lse_b) o_b) / (exp(lse_a) + exp(lse_b)) = o_a + w (o_b - o_a),  w = sigmoid(lse_b - lse_a)

Written with the sigmoid nothing overflows, whatever the two log-sum-exps are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(o_SBHD: Tensor, lse_BHS: Tensor, other_o_SBHD: Tensor, other_lse_BHS: Tensor) -> None:
    """Merge `other` into (o, lse) in place. o [S, B, H, D] and lse [B, H, S] in fp32 or fp64; lse finite."""
    weight_SBH1 = torch.sigmoid(other_lse_BHS - lse_BHS).permute(2, 0, 1).unsqueeze(-1)
    o_SBHD.lerp_(other_o_SBHD.to(o_SBHD.dtype), weight_SBH1)
    torch.logaddexp(lse_BHS, other_lse_BHS, out=lse_BHS)
