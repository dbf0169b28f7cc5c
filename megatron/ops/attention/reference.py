"""Reference attention, straight from the definition, for any device and dtype: the yardstick of the other backends.

Query rows are processed in blocks, so that only scores [B, H, 512, Sk] are in memory at a time, not [B, H, Sq, Sk].
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.documents import Mask
from megatron.ops.attention.protocol import QKV, AttentionOutput, AttentionRequest, KernelVariant

_BLOCK_ROWS = 512


class ReferenceAttention:
    name = "reference"
    has_windows = True

    def refusal(self, request: AttentionRequest) -> str | None:
        return None

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        q, k, v = qkv
        k_BHSD, v_BHSD = (_heads_first(t, q.shape[2]) for t in (k, v))
        o, lse = [], []
        for start in range(0, len(q), _BLOCK_ROWS):
            q_BHSD = _heads_first(q[start : start + _BLOCK_ROWS], q.shape[2])
            scores = _scores(q_BHSD, k_BHSD, start, variant)
            lse.append(scores.logsumexp(-1))
            o.append((scores - lse[-1].unsqueeze(-1)).exp() @ v_BHSD)
        return AttentionOutput(torch.cat(o, 2).permute(2, 0, 1, 3).to(q.dtype), torch.cat(lse, 2))

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        (q, k, v), (o, lse) = qkv, output
        H, K = q.shape[2], k.shape[2]
        k_BHSD, v_BHSD = _heads_first(k, H), _heads_first(v, H)
        dq, dk, dv = [], torch.zeros_like(k_BHSD), torch.zeros_like(v_BHSD)
        for start in range(0, len(q), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            q_BHSD, do_BHSD, o_BHSD = (_heads_first(t[rows], H) for t in (q, do, o))
            scores = _scores(q_BHSD, k_BHSD, start, variant)
            probabilities = (scores - lse[:, :, rows].unsqueeze(-1)).exp()
            delta = (do_BHSD * o_BHSD).sum(-1, keepdim=True)
            dscores = probabilities * (do_BHSD @ v_BHSD.mT - delta) * variant.scale
            if variant.softcap is not None:
                dscores *= 1 - (scores / variant.softcap).clamp(min=-1) ** 2  # the derivative of tanh
            dq.append(dscores @ k_BHSD)
            dk += dscores.mT @ q_BHSD
            dv += probabilities.mT @ do_BHSD
        dk, dv = (t.unflatten(1, (K, -1)).sum(2) for t in (dk, dv))  # [B, H, S, D] -> [B, K, S, D]
        return tuple(t.permute(2, 0, 1, 3).to(q.dtype) for t in (torch.cat(dq, 2), dk, dv))  # type: ignore[return-value]


def _heads_first(t_SBKD: Tensor, num_heads: int) -> Tensor:
    """Permute [S, B, K, D] -> [B, H, S, D] in at least fp32, key/value heads repeated for their query heads."""
    t = t_SBKD.permute(1, 2, 0, 3).to(torch.promote_types(t_SBKD.dtype, torch.float32))
    return t.repeat_interleave(num_heads // t.shape[1], 1)


def _scores(q_BHSD: Tensor, k_BHSD: Tensor, first_row: int, variant: KernelVariant) -> Tensor:
    scores = q_BHSD @ k_BHSD.mT * variant.scale
    if variant.softcap is not None:
        scores = variant.softcap * (scores / variant.softcap).tanh()
    if variant.mask is Mask.FULL:
        return scores
    rows = torch.arange(first_row, first_row + q_BHSD.shape[2], device=scores.device)[:, None]
    columns = torch.arange(k_BHSD.shape[2], device=scores.device)
    unseen = columns > rows if variant.mask is Mask.CAUSAL else columns < rows
    if variant.window is not None:
        unseen = unseen | (columns <= rows - variant.window)
    return scores.masked_fill(unseen, float("-inf"))
