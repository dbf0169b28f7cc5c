"""Ulysses all-to-all: tokens scattered and heads whole  <->  tokens whole and heads scattered.

    c tokens of this rank, S = p c tokens of all, B batch, H heads, D head size, p ranks, r this rank
    tokens_to_heads   [c, B, H, D] -> [S, B, H/p, D]     rank r keeps heads [r H/p, (r+1) H/p)
    heads_to_tokens   [S, B, H/p, D] -> [c, B, H, D]     the inverse

Several tensors travel in one message. Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def tokens_to_heads(tensors_cBHD: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Gather tokens and scatter heads; one all-to-all for all tensors, which may differ in H only.

    Collective: every rank of `group` calls it with the same shapes. The results are views of one buffer, side by side
    along the head dimension. Without a group the tensors come back as they are.
    """
    if group is None:
        return list(tensors_cBHD)
    p = dist.get_world_size(group)
    heads = [t.shape[2] // p for t in tensors_cBHD]
    c, B, _, D = tensors_cBHD[0].shape
    send_pcBHD = tensors_cBHD[0].new_empty(p, c, B, sum(heads), D)
    for target, t in zip(send_pcBHD.split(heads, 3), tensors_cBHD, strict=True):
        target.copy_(t.unflatten(2, (p, -1)).permute(2, 0, 1, 3, 4))  # [c, B, p*H, D] -> [p, c, B, H, D]
    received = torch.empty_like(send_pcBHD)
    dist.all_to_all_single(received, send_pcBHD, group=group)
    return list(received.flatten(0, 1).split(heads, 2))


def heads_to_tokens(tensors_SBHD: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Scatter tokens and gather heads: the inverse of `tokens_to_heads`, with the same rules."""
    if group is None:
        return list(tensors_SBHD)
    p = dist.get_world_size(group)
    heads = [t.shape[2] for t in tensors_SBHD]
    send_SBHD = torch.cat(list(tensors_SBHD), 2) if len(heads) > 1 else tensors_SBHD[0].contiguous()
    received_SBHD = torch.empty_like(send_SBHD)
    dist.all_to_all_single(received_SBHD, send_SBHD, group=group)
    by_rank_cBpHD = received_SBHD.unflatten(0, (p, -1)).permute(1, 2, 0, 3, 4)  # [p*c, B, H, D] -> [c, B, p, H, D]
    return [t.flatten(2, 3) for t in by_rank_cBpHD.split(heads, 3)]


def repeat_key_value_heads(t_SBKD: Tensor, sequence_parallel_size: int) -> Tensor:
    """Repeat each key/value head until the sequence-parallel size p divides them; [S, B, K, D] -> [S, B, lcm(K, p), D].

    A rank then holds exactly the heads that its query heads read, for every p that divides the query heads.
    Differentiable: the gradients of the copies are summed.
    """
    copies = lcm(t_SBKD.shape[2], sequence_parallel_size) // t_SBKD.shape[2]
    return t_SBKD if copies == 1 else t_SBKD.repeat_interleave(copies, 2)


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.contiguous() for t in tokens_to_heads(tensors, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *heads_to_tokens(grads, ctx.group)


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.contiguous() for t in heads_to_tokens(tensors, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *tokens_to_heads(grads, ctx.group)


def differentiable_tokens_to_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """`tokens_to_heads` with a gradient: one all-to-all forward and one backward, on every rank of the group."""
    return tuple(tensors) if group is None else _TokensToHeads.apply(group, *tensors)


def differentiable_heads_to_tokens(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """`heads_to_tokens` with a gradient: one all-to-all forward and one backward, on every rank of the group."""
    return tuple(tensors) if group is None else _HeadsToTokens.apply(group, *tensors)
