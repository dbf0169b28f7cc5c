"""The all-to-all of a chunk: tokens scattered and heads whole  <->  tokens gathered and heads scattered.

    c tokens of this rank, S = p c tokens of all, B batch, H heads, D head size, p ranks, r this rank
    tokens_to_heads   [c, B, H, D] -> [S, B, H/p, D]     rank r receives heads [r H/p, (r+1) H/p)
    heads_to_tokens   [S, B, H/p, D] -> [c, B, H, D]     the inverse

Where p does not divide H, ranks receive different numbers of heads, or some rows of the queries only
(megatron.core.head_layout). Several tensors travel in one message; keys and values have one of their own where queries
have fewer rows. Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.head_layout import HeadLayout
from megatron.core.head_messages import Message, plan_messages
from megatron.core.ranges import ALL_TO_ALL, named_range

# An all-to-all in progress. Calling it waits, on the device where there is one, and returns its result.
Exchange = Callable[[], list[Tensor]]

# Parts of a projection's tensors: q (1), and kv with keys first, then values (2).
QUERIES_KEYS_VALUES = (1, 2)

WORD = torch.int64


def tokens_to_heads(
    tensors_cBHD: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    heads: HeadLayout,
    parts: Sequence[int] | None = None,
) -> list[Tensor]:
    """Gather tokens and scatter heads.

    A tensor of one of the `parts`, the default, has the heads of queries: q, o and their gradients. A tensor of two has
    keys, then values, repeated as `heads` says. Collective: every rank of `group` calls it with the same shapes. The
    results are views, side by side along the head dimension of a buffer. Without a group the tensors are returned
    unchanged.
    """
    (exchange,) = start_shares_to_heads(tensors_cBHD, group, heads, parts)
    return exchange()


def start_shares_to_heads(
    tensors_cBHD: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    heads: HeadLayout,
    parts: Sequence[int] | None = None,
    num_shares: int = 1,
) -> list[Exchange]:
    """Start `tokens_to_heads` as one all-to-all for each of `num_shares` equal shares of every rank's heads.

    Attention of one share can run while the next is exchanged. The results have the heads of their share. Every rank's
    heads, and those of each part, must be a multiple of `num_shares`; without a group it is 1.
    """
    if group is None:
        return [lambda: list(tensors_cBHD)]
    parts = tuple(parts or (1,) * len(tensors_cBHD))
    messages = plan_messages(heads, group.rank(), len(tensors_cBHD[0]), parts, num_shares)

    def start(share: int) -> Exchange:
        exchanges = [_start_to_heads(tensors_cBHD, group, message, share) for message in messages]
        return exchanges[0] if len(exchanges) == 1 else partial(_finish_all, messages, exchanges)

    return [start(share) for share in range(num_shares)]


def _start_to_heads(
    all_tensors_cBHD: Sequence[Tensor], group: dist.ProcessGroup, message: Message, share: int
) -> Exchange:
    tensors_cBHD = [all_tensors_cBHD[i] for i in message.tensors]
    _, B, _, D = tensors_cBHD[0].shape
    send = tensors_cBHD[0].new_empty(message.sent_size * B * D)
    for place, part in _places(message, send, tensors_cBHD, share):
        place.copy_(part)
    received_SBHD = send.new_empty(message.num_rows, B, sum(message.widths), D)
    sent_sizes, received_sizes = _split_sizes(message, B * D)
    work = _all_to_all(received_SBHD, received_sizes, send, sent_sizes, group)

    def finish() -> list[Tensor]:
        with named_range(ALL_TO_ALL):
            work.wait()
        return list(received_SBHD.split(message.widths, 2))

    return finish


def _finish_all(messages: Sequence[Message], exchanges: Sequence[Exchange]) -> list[Tensor]:
    """Wait for several messages; return their tensors by number."""
    tensors: dict[int, Tensor] = {}
    for message, exchange in zip(messages, exchanges, strict=True):
        tensors.update(zip(message.tensors, exchange(), strict=True))
    return [tensors[i] for i in range(len(tensors))]


def heads_to_tokens(
    tensors_SBHD: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    heads: HeadLayout,
    parts: Sequence[int] | None = None,
) -> list[Tensor]:
    """Scatter tokens and gather heads: the inverse of `tokens_to_heads`, with the same rules."""
    exchange = SharesToTokens(group, heads, parts)
    exchange.start(tensors_SBHD)
    return exchange()


class SharesToTokens:
    """The exchange `heads_to_tokens` as one all-to-all per share of every rank's heads.

    It is the inverse of `start_shares_to_heads`. Calling it waits for all of them, and returns the heads of all shares.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        heads: HeadLayout,
        parts: Sequence[int] | None = None,
        num_shares: int = 1,
    ) -> None:
        self._group, self._heads, self._parts, self._num_shares = group, heads, parts, num_shares
        self._tensors: list[Tensor] = []  # without a group
        self._messages: tuple[Message, ...] = ()  # of each share
        self._received: list[Tensor] = []  # of all messages started
        self._works: list[dist.Work] = []
        self._shape_cBD = (0, 0, 0)

    def start(self, tensors_SBHD: Sequence[Tensor]) -> None:
        """Start the all-to-all of the next share."""
        if self._group is None:
            self._tensors = list(tensors_SBHD)
            return
        parts = tuple(self._parts or (1,) * len(tensors_SBHD))
        S, B, _, D = tensors_SBHD[0].shape
        c = S // (self._heads.num_groups if parts[0] == 1 else self._heads.num_ranks)
        self._shape_cBD = c, B, D
        self._messages = plan_messages(self._heads, self._group.rank(), c, parts, self._num_shares)
        for message in self._messages:
            own = [tensors_SBHD[i] for i in message.tensors]
            send_SBHD = torch.cat(own, 2) if len(own) > 1 else own[0].contiguous()
            self._received.append(send_SBHD.new_empty(message.sent_size * B * D))
            received_sizes, sent_sizes = _split_sizes(message, B * D)  # the other way
            work = _all_to_all(self._received[-1], received_sizes, send_SBHD, sent_sizes, self._group)
            self._works.append(work)

    def __call__(self) -> list[Tensor]:
        if self._group is None:
            return self._tensors
        with named_range(ALL_TO_ALL):
            for work in self._works:
                work.wait()
        c, B, D = self._shape_cBD
        tensors = {
            i: self._received[0].new_empty(c, B, num_heads, D)
            for message in self._messages
            for i, num_heads in zip(message.tensors, message.num_heads, strict=True)
        }
        for number, received in enumerate(self._received):
            share, kind = divmod(number, len(self._messages))
            message = self._messages[kind]
            for place, part in _places(message, received, [tensors[i] for i in message.tensors], share):
                part.copy_(place)
        return [tensors[i] for i in range(len(tensors))]


def _places(
    message: Message, flat: Tensor, tensors_cBHD: Sequence[Tensor], share: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """View the flat message and a share of the tensors [c, B, n H, D], of n parts, in pairs.

    Each is [ranks, rows, B, n, heads, D], and its elements are words where they can be.
    """
    flat, *tensors_cBHD = _in_words(flat, *tensors_cBHD)
    c, B, _, D = tensors_cBHD[0].shape
    runs, num_shares = message.runs, message.num_shares
    blocks = [flat] if message.is_even else flat.split([run.size * B * D for run in runs])
    for run, block in zip(runs, blocks, strict=True):
        m, rows = run.num_ranks, run.num_rows
        places = block.view(m, rows, B, -1, D).split(run.widths, 3)
        for place, t, n, heads in zip(places, tensors_cBHD, message.parts, run.heads, strict=True):
            if not run.is_everything:
                t = t.view(c, B, n, -1, D)[run.rows, :, :, heads]
            if num_shares > 1:
                t = t.view(rows, B, n, m, num_shares, -1, D)[:, :, :, :, share]
            else:
                t = t.view(rows, B, n, m, -1, D)
            yield place.view(m, rows, B, n, -1, D), t.permute(3, 0, 1, 2, 4, 5)


def _in_words(*tensors: Tensor) -> Sequence[Tensor]:
    """View the tensors in words of 8 bytes, if all can be: a GPU copies permuted elements one by one."""
    num_elements = WORD.itemsize // tensors[0].itemsize

    def is_aligned(t: Tensor) -> bool:
        *strides, last = t.stride()
        return last == 1 and all(n % num_elements == 0 for n in (t.shape[-1], t.storage_offset(), *strides))

    return [t.view(WORD) for t in tensors] if all(map(is_aligned, tensors)) else tensors


def _split_sizes(message: Message, num_elements: int) -> tuple[list[int] | None, list[int] | None]:
    """Return the elements (sent to, received from) each rank, None if they are equal."""
    if message.is_even:
        return None, None
    return [n * num_elements for n in message.sent_sizes], [n * num_elements for n in message.received_sizes]


def _all_to_all(
    received: Tensor,
    received_sizes: list[int] | None,
    sent: Tensor,
    sent_sizes: list[int] | None,
    group: dist.ProcessGroup,
) -> dist.Work:
    with named_range(ALL_TO_ALL):
        work = dist.all_to_all_single(
            received.view(-1), sent.view(-1), received_sizes, sent_sizes, group=group, async_op=True
        )
    assert work is not None, "it is asynchronous"
    return work


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        heads: HeadLayout,
        parts: Sequence[int] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.heads, ctx.parts = group, heads, parts
        return tuple(t.contiguous() for t in tokens_to_heads(tensors, group, heads, parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *heads_to_tokens(grads, ctx.group, ctx.heads, ctx.parts)


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, heads: HeadLayout, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.heads = group, heads
        return tuple(t.contiguous() for t in heads_to_tokens(tensors, group, heads))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *tokens_to_heads(grads, ctx.group, ctx.heads)


def differentiable_tokens_to_heads(
    tensors: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    heads: HeadLayout,
    parts: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Differentiable `tokens_to_heads`: as many all-to-alls backward as forward, on every rank of the group."""
    return tuple(tensors) if group is None else _TokensToHeads.apply(group, heads, parts, *tensors)


def differentiable_heads_to_tokens(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None, heads: HeadLayout
) -> tuple[Tensor, ...]:
    """Differentiable `heads_to_tokens`: as many all-to-alls backward as forward, on every rank of the group."""
    return tuple(tensors) if group is None else _HeadsToTokens.apply(group, heads, *tensors)
