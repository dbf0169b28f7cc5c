"""The Ulysses all-to-all between real ranks: who ends with which tokens and heads, and with which gradients."""

import pytest
import torch
from torch import Tensor

from megatron.core.collectives import (
    QUERIES_KEYS_VALUES,
    SharesToTokens,
    differentiable_heads_to_tokens,
    differentiable_tokens_to_heads,
    heads_to_tokens,
    start_shares_to_heads,
    tokens_to_heads,
)
from megatron.core.head_layout import HeadLayout
from megatron.core.parallel_state import ParallelState
from tests.distributed.rank_pool import RankPool

TOKENS, BATCH, HEAD_SIZE = 12, 2, 3


def whole(num_heads: int, dtype: torch.dtype = torch.float64, head_size: int = HEAD_SIZE) -> Tensor:
    """Numbers that differ everywhere: [S, B, H, D]."""
    return torch.arange(TOKENS * BATCH * num_heads * head_size, dtype=dtype).view(TOKENS, BATCH, num_heads, -1)


def held(t: Tensor, rank: int, layout: HeadLayout, parts: int = 1) -> Tensor:
    """What a rank has of `t` once heads are scattered: its rows, if they are of queries, and its heads of each part."""
    groups, group, rows = layout.heads_of_groups, rank % layout.num_groups, layout.rows(rank).spans(TOKENS)
    if parts > 1:
        groups = tuple(n // layout.queries_per_key for n in groups * layout.num_row_shares)
        group, rows = rank, [(0, TOKENS)]
    start = sum(groups[:group])
    heads = torch.cat([part[:, :, start : start + groups[group]] for part in t.chunk(parts, 2)], 2)
    return torch.cat([heads[first:last] for first, last in rows])


def gather_and_scatter(num_heads: int, num_key_value_heads: int) -> bool:
    """Send q, kv and o there and back; whether this rank had what is its own in between.

    Heads of 16 bytes travel in words, of 12 they do not.
    """
    numbers = (torch.float64, HEAD_SIZE), (torch.float32, 4), (torch.float32, HEAD_SIZE)
    results = [_gather_and_scatter(num_heads, num_key_value_heads, *each) for each in numbers]
    return all(results)


def _gather_and_scatter(num_heads: int, num_key_value_heads: int, dtype: torch.dtype, head_size: int) -> bool:
    state = ParallelState.create(torch.distributed.get_world_size())
    rank, size, group = state.rank, state.world_size, state.sequence_parallel_group
    layout, parts = HeadLayout(num_heads, num_key_value_heads, size), (*QUERIES_KEYS_VALUES, 1)
    q, k = (whole(n, dtype, head_size) for n in (num_heads, num_key_value_heads))
    kv = layout.repeated_keys_and_values(torch.cat([k + 10000, k + 20000], 2))
    tensors = [q, kv, q + 30000]
    local = [t.chunk(size)[rank] for t in tensors]
    gathered = tokens_to_heads(local, group, layout, parts)
    wanted = [held(t, rank, layout, n) for t, n in zip(tensors, parts, strict=True)]
    there = all(torch.equal(g, t) for g, t in zip(gathered, wanted, strict=True))
    returned = heads_to_tokens(gathered, group, layout, parts)
    return there and all(torch.equal(r, t) for r, t in zip(returned, local, strict=True))


def differentiate(num_heads: int) -> bool:
    """Whether a weighted sum has its weights as gradients, of either direction's input."""
    state = ParallelState.create(torch.distributed.get_world_size())
    rank, size, group = state.rank, state.world_size, state.sequence_parallel_group
    layout, weights = HeadLayout(num_heads, num_heads, size), whole(num_heads)
    tokens, heads = weights.chunk(size)[rank], held(weights, rank, layout)
    x = torch.zeros_like(tokens, requires_grad=True)
    (gathered,) = differentiable_tokens_to_heads([x], group, layout)
    (gathered * heads).sum().backward()
    y = torch.zeros_like(heads, requires_grad=True)
    (scattered,) = differentiable_heads_to_tokens([y], group, layout)
    (scattered * tokens).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    return torch.equal(x.grad, tokens) and torch.equal(y.grad, heads)


@pytest.mark.parametrize("heads", [(8, 4), (8, 1), (7, 7), (14, 7), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_gets_its_rows_and_heads_and_its_own_tokens_back(
    ranks: RankPool, size: int, heads: tuple[int, int]
) -> None:
    assert ranks.run(gather_and_scatter, *heads, num_ranks=size) == [True] * size


def scatter_shares(num_heads: int) -> bool:
    """Send two shares of the heads there and back; whether each had its half of each part's heads."""
    state = ParallelState.create(torch.distributed.get_world_size())
    rank, size, group = state.rank, state.world_size, state.sequence_parallel_group
    layout = HeadLayout(num_heads, num_heads // 2, size)
    kv = layout.repeated_keys_and_values(torch.cat([whole(num_heads // 2) + n for n in (1000, 2000)], 2))
    tensors = whole(num_heads), kv
    local = [t.chunk(size)[rank] for t in tensors]
    own = [held(t, rank, layout, n).chunk(n, 2) for t, n in zip(tensors, QUERIES_KEYS_VALUES, strict=True)]
    back, there = SharesToTokens(group, layout, QUERIES_KEYS_VALUES, 2), True
    for share, exchange in enumerate(start_shares_to_heads(local, group, layout, QUERIES_KEYS_VALUES, 2)):
        gathered = exchange()
        wanted = [torch.cat([part.chunk(2, 2)[share] for part in each], 2) for each in own]
        there = there and all(torch.equal(g, t) for g, t in zip(gathered, wanted, strict=True))
        back.start(gathered)
    return there and all(torch.equal(r, t) for r, t in zip(back(), local, strict=True))


@pytest.mark.parametrize("num_heads, size", [(16, 2), (16, 4), (8, 6)])
def test_heads_travel_in_shares(ranks: RankPool, num_heads: int, size: int) -> None:
    assert HeadLayout(num_heads, num_heads // 2, size).divisible_by(2)
    assert ranks.run(scatter_shares, num_heads, num_ranks=size) == [True] * size


@pytest.mark.parametrize("num_heads, size", [(4, 1), (4, 2), (7, 4), (2, 4)])
def test_gradients_travel_the_other_way(ranks: RankPool, num_heads: int, size: int) -> None:
    assert ranks.run(differentiate, num_heads, num_ranks=size) == [True] * size
