"""Ulysses all-to-all: tokens scattered and heads whole  <->  tokens whole and heads scattered.

    c tokens of this rank, S = p c tokens of all, B batch, H heads, D head size, p ranks, r this rank
    tokens_to_heads   [c, B, H, D] -> [S, B, H/p, D]     rank r receives heads [r H/p, (r+1) H/p)
    heads_to_tokens   [S, B, H/p, D] -> [c, B, H, D]     the inverse

Several tensors travel in one message. Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.ranges import ALL_TO_ALL, named_range

# An all-to-all in progress. Calling it waits, on the device where there is one, and returns its result.
Exchange = Callable[[], list[Tensor]]

# Parts of a projection's tensors: q (1), and kv with keys first, then values (2).
QUERIES_KEYS_VALUES = (1, 2)


def tokens_to_heads(
    tensors_cBHD: Sequence[Tensor], group: dist.ProcessGroup | None, parts: Sequence[int] | None = None
) -> list[Tensor]:
    """Gather tokens and scatter heads; one all-to-all for all tensors, which may differ in H only.

    In a tensor of several `parts` (kv: 2) the heads of each part are scattered separately.
    Collective: every rank of `group` calls it with the same shapes. The results are views of one buffer, side by side
    along the head dimension. Without a group the tensors are returned unchanged.
    """
    return start_tokens_to_heads(tensors_cBHD, group, parts)()


def start_tokens_to_heads(
    tensors_cBHD: Sequence[Tensor], group: dist.ProcessGroup | None, parts: Sequence[int] | None = None
) -> Exchange:
    """Start `tokens_to_heads` asynchronously: compute queued before the result is called overlaps with it."""
    (exchange,) = start_shares_to_heads(tensors_cBHD, group, parts)
    return exchange


def start_shares_to_heads(
    tensors_cBHD: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    parts: Sequence[int] | None = None,
    num_shares: int = 1,
) -> list[Exchange]:
    """Start `tokens_to_heads` as one all-to-all for each of `num_shares` equal shares of every rank's heads.

    Attention of one share can run while the next is exchanged. The results have the heads of their share. A rank's
    heads, and those of each part, must be a multiple of `num_shares`; without a group it is 1.
    """
    if group is None:
        return [lambda: list(tensors_cBHD)]
    p = dist.get_world_size(group)
    parts = parts or [1] * len(tensors_cBHD)
    heads = [t.shape[2] // (p * num_shares) for t in tensors_cBHD]
    c, B, _, D = tensors_cBHD[0].shape
    send_gpcBHD = tensors_cBHD[0].new_empty(num_shares, p, c, B, sum(heads), D)
    for target, t, n in zip(send_gpcBHD.split(heads, 4), tensors_cBHD, parts, strict=True):
        # [c, B, n*p*g*H, D] -> [g, p, c, B, n, H, D]
        target.unflatten(4, (n, -1)).copy_(t.unflatten(2, (n, p, num_shares, -1)).permute(4, 3, 0, 1, 2, 5, 6))
    return [_start_to_heads(send_pcBHD, heads, group) for send_pcBHD in send_gpcBHD]


def _start_to_heads(send_pcBHD: Tensor, heads: Sequence[int], group: dist.ProcessGroup) -> Exchange:
    received = torch.empty_like(send_pcBHD)
    with named_range(ALL_TO_ALL):
        work = dist.all_to_all_single(received, send_pcBHD, group=group, async_op=True)

    def finish() -> list[Tensor]:
        with named_range(ALL_TO_ALL):
            work.wait()
        return list(received.flatten(0, 1).split(heads, 2))

    return finish


def heads_to_tokens(
    tensors_SBHD: Sequence[Tensor], group: dist.ProcessGroup | None, parts: Sequence[int] | None = None
) -> list[Tensor]:
    """Scatter tokens and gather heads: the inverse of `tokens_to_heads`, with the same rules."""
    return start_heads_to_tokens(tensors_SBHD, group, parts)()


def start_heads_to_tokens(
    tensors_SBHD: Sequence[Tensor], group: dist.ProcessGroup | None, parts: Sequence[int] | None = None
) -> Exchange:
    """Start `heads_to_tokens` asynchronously: compute queued before the result is called overlaps with it."""
    exchange = SharesToTokens(group, parts)
    exchange.start(tensors_SBHD)
    return exchange


class SharesToTokens:
    """The exchange `heads_to_tokens` as one all-to-all per share of every rank's heads.

    It is the inverse of `start_shares_to_heads`. Calling it waits for all of them, and returns the heads of all shares.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, parts: Sequence[int] | None = None, num_shares: int = 1
    ) -> None:
        self._group, self._parts, self._num_shares = group, parts, num_shares
        self._tensors: list[Tensor] = []  # those of the last share
        self._received_gSBHD: Tensor | None = None
        self._works: list[Any] = []

    def start(self, tensors_SBHD: Sequence[Tensor]) -> None:
        """Start the all-to-all of the next share."""
        if self._group is None:
            self._tensors = list(tensors_SBHD)
            return
        self._heads = [t.shape[2] for t in tensors_SBHD]
        send_SBHD = torch.cat(list(tensors_SBHD), 2) if len(self._heads) > 1 else tensors_SBHD[0].contiguous()
        if self._received_gSBHD is None:
            self._received_gSBHD = send_SBHD.new_empty(self._num_shares, *send_SBHD.shape)
        received = self._received_gSBHD[len(self._works)]
        with named_range(ALL_TO_ALL):
            self._works.append(dist.all_to_all_single(received, send_SBHD, group=self._group, async_op=True))

    def __call__(self) -> list[Tensor]:
        if self._received_gSBHD is None:
            return self._tensors
        with named_range(ALL_TO_ALL):
            for work in self._works:
                work.wait()
        p = dist.get_world_size(self._group)
        by_rank_gpcBHD = self._received_gSBHD.unflatten(1, (p, -1)).split(self._heads, 4)
        # [g, p, c, B, n*H, D] -> [c, B, n*p*g*H, D]
        return [
            t.unflatten(4, (n, -1)).permute(2, 3, 4, 1, 0, 5, 6).flatten(2, 5)
            for t, n in zip(by_rank_gpcBHD, self._parts or [1] * len(self._heads), strict=True)
        ]


def repeat_key_value_heads(kv_SBKD: Tensor, sequence_parallel_size: int) -> Tensor:
    """Repeat each key/value head until the sequence-parallel size p divides them.

    kv [S, B, 2K, D] -> [S, B, 2 lcm(K, p), D], keys first. A rank then holds exactly the heads that its query heads
    read, for every p that divides the query heads. Differentiable: the gradients of the copies are summed.
    """
    num_heads = kv_SBKD.shape[2] // 2
    copies = lcm(num_heads, sequence_parallel_size) // num_heads
    return kv_SBKD if copies == 1 else kv_SBKD.repeat_interleave(copies, 2)


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup | None, parts: Sequence[int] | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.parts = group, parts
        return tuple(t.contiguous() for t in tokens_to_heads(tensors, group, parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *heads_to_tokens(grads, ctx.group, ctx.parts)


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.contiguous() for t in heads_to_tokens(tensors, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *tokens_to_heads(grads, ctx.group)


def differentiable_tokens_to_heads(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None, parts: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Differentiable `tokens_to_heads`: one all-to-all forward and one backward, on every rank of the group."""
    return tuple(tensors) if group is None else _TokensToHeads.apply(group, parts, *tensors)


def differentiable_heads_to_tokens(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Differentiable `heads_to_tokens`: one all-to-all forward and one backward, on every rank of the group."""
    return tuple(tensors) if group is None else _HeadsToTokens.apply(group, *tensors)
