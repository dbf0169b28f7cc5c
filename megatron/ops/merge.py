"""Merge of partial attention results (online softmax), and sums of gradients over a row or a column of tiles.

Results of the same queries over different keys, merged all at once, or two by two:

    o = sum_i w_i o_i,  w = softmax(lse)
    o = (exp(lse_a) o_a + exp(lse_b) o_b) / (exp(lse_a) + exp(lse_b)) = o_a + w (o_b - o_a),  w = sigmoid(lse_b - lse_a)

Written with softmax and sigmoid, nothing overflows for any two log-sum-exps.

A sink is a score per head that joins the softmax of every query and has no value: a result with o = 0 and lse = sink.
Its gradient, given o and lse with the sink, is dsink = -sum over queries of exp(sink - lse) (do . o).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.ops.fused import fused


def merge(results: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Merge one or more results to o [S, B, H, D], in the dtype of lse.

    A result is (o [S, B, H, D], lse [B, H, S] in fp32 or fp64) over its own keys; lse is finite.
    """
    o_NSBHD, lse_NBHS = (torch.stack(tensors) for tensors in zip(*results, strict=True))
    weights_NSBH = lse_NBHS.softmax(0).permute(0, 3, 1, 2)  # [N, B, H, S] -> [N, S, B, H]
    return (o_NSBHD * weights_NSBH.unsqueeze(-1)).sum(0)


def merge_(o_SBHD: Tensor, lse_BHS: Tensor, other_o_SBHD: Tensor, other_lse_BHS: Tensor) -> None:
    """Merge `other` into (o, lse) in place. o [S, B, H, D] and lse [B, H, S] are fp32 or fp64; lse is finite."""
    # Fused with the interpolation, the weight of a head would be computed D times: 1.4% of a forward pass.
    weight_SBH = torch.sigmoid(other_lse_BHS - lse_BHS).permute(2, 0, 1).contiguous()
    _interpolate_(o_SBHD, other_o_SBHD, weight_SBH)
    torch.logaddexp(lse_BHS, other_lse_BHS, out=lse_BHS)


def check_sinks(sinks_H: Tensor | None, q_SBHD: Tensor) -> None:
    """Raise ValueError for sinks that are not one for each head of q."""
    num_heads = q_SBHD.shape[2]
    if sinks_H is not None and sinks_H.shape != (num_heads,):
        raise ValueError(
            f"a sink for each of the {num_heads} query heads is needed, got a tensor {tuple(sinks_H.shape)}"
        )


def merge_sinks_(o_SBHD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> None:
    """Merge the sinks [H] into (o, lse) in place. o may be in half precision."""
    sinks_H1 = sinks_H.to(lse_BHS.dtype).unsqueeze(-1)
    _scale_(o_SBHD, torch.sigmoid(lse_BHS - sinks_H1).permute(2, 0, 1).contiguous())
    torch.logaddexp(lse_BHS, sinks_H1, out=lse_BHS)


def with_sinks(results: Sequence[tuple[Tensor, Tensor]], sinks_H: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the results and that of the sinks [H], for `merge`."""
    o_SBHD, lse_BHS = results[0]
    return [*results, (torch.zeros_like(o_SBHD), sinks_H.to(lse_BHS.dtype).unsqueeze(-1).expand_as(lse_BHS))]


@fused
def sink_gradients(o_SBHD: Tensor, do_SBHD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """Compute dsinks [H] in the dtype of lse, given o and lse with the sinks."""
    dot_SBH = (o_SBHD.to(lse_BHS.dtype) * do_SBHD.to(lse_BHS.dtype)).sum(-1)
    weights_BHS = (sinks_H.to(lse_BHS.dtype).unsqueeze(-1) - lse_BHS).exp()
    return -(weights_BHS * dot_SBH.permute(1, 2, 0)).sum((0, 2))


@fused
def _scale_(o_SBHD: Tensor, weight_SBH: Tensor) -> None:
    o_SBHD.mul_(weight_SBH.unsqueeze(-1))


@fused
def _interpolate_(o_SBHD: Tensor, other_SBHD: Tensor, weight_SBH: Tensor) -> None:
    o_SBHD.lerp_(other_SBHD.to(o_SBHD.dtype), weight_SBH.unsqueeze(-1))


@fused
def add_(total: Tensor, part: Tensor) -> None:
    """Add a tile's dq to the sum in fp32 or fp64."""
    total.add_(part)


@fused
def add_key_value_gradients_(dkv_SBKD: Tensor, dk_SBKD: Tensor, dv_SBKD: Tensor) -> None:
    """Add a tile's dk and dv [S, B, K, D] to the sum [S, B, 2K, D], dk first, in fp32 or fp64."""
    _add_to_halves_(dkv_SBKD, dk_SBKD, dv_SBKD)


@fused
def add_gradients_(dq_sum: Tensor, dkv_sum: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add a tile's dq as `add_` does, and its dk and dv as `add_key_value_gradients_` does, in one call."""
    dq_sum.add_(dq)
    _add_to_halves_(dkv_sum, dk, dv)


def _add_to_halves_(dkv: Tensor, dk: Tensor, dv: Tensor) -> None:
    for total, part in zip(dkv.chunk(2, 2), (dk, dv), strict=True):
        total.add_(part)
