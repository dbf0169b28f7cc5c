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
    repeat_key_value_heads,
    start_shares_to_heads,
    tokens_to_heads,
)
from megatron.core.parallel_state import ParallelState
from tests.distributed.rank_pool import RankPool

TOKENS, BATCH, HEAD_SIZE = 12, 2, 3


def whole(num_heads: int) -> Tensor:
    """Numbers that differ everywhere: [S, B, H, D] in fp64."""
    return torch.arange(TOKENS * BATCH * num_heads * HEAD_SIZE, dtype=torch.float64).view(TOKENS, BATCH, num_heads, -1)


def gather_and_scatter(num_heads: tuple[int, ...]) -> bool:
    """Send tensors there and back; whether this rank held all tokens of its heads in between."""
    state = ParallelState.create(torch.distributed.get_world_size())
    rank, size, group = state.rank, state.world_size, state.sequence_parallel_group
    tensors = [whole(heads) for heads in num_heads]
    local = [t.chunk(size)[rank] for t in tensors]
    gathered = tokens_to_heads(local, group)
    there = all(torch.equal(g, t.chunk(size, 2)[rank]) for g, t in zip(gathered, tensors, strict=True))
    back = all(torch.equal(r, t) for r, t in zip(heads_to_tokens(gathered, group), local, strict=True))
    return there and back


def differentiate() -> tuple[Tensor, Tensor]:
    """Gradients of a function that weighs every element by its own number: of either direction's input."""
    state = ParallelState.create(torch.distributed.get_world_size())
    rank, size, group = state.rank, state.world_size, state.sequence_parallel_group
    weights = whole(4)
    tokens = torch.zeros_like(weights.chunk(size)[rank], requires_grad=True)
    (gathered,) = differentiable_tokens_to_heads([tokens], group)
    (gathered * weights.chunk(size, 2)[rank]).sum().backward()
    heads = torch.zeros_like(weights.chunk(size, 2)[rank], requires_grad=True)
    (scattered,) = differentiable_heads_to_tokens([heads], group)
    (scattered * weights.chunk(size)[rank]).sum().backward()
    assert tokens.grad is not None
    assert heads.grad is not None
    return tokens.grad, heads.grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gets_all_tokens_of_its_heads_and_its_own_tokens_back(ranks: RankPool, size: int) -> None:
    assert ranks.run(gather_and_scatter, (8, 4, 4), num_ranks=size) == [True] * size


def scatter_parts() -> bool:
    """Send a tensor of two parts there and back; whether each part's heads were scattered by themselves."""
    state = ParallelState.create(torch.distributed.get_world_size())
    rank, size, group = state.rank, state.world_size, state.sequence_parallel_group
    queries, keys, values = whole(8), whole(4) + 1000, whole(4) + 2000
    local = [t.chunk(size)[rank] for t in (queries, torch.cat([keys, values], 2))]
    gathered = tokens_to_heads(local, group, QUERIES_KEYS_VALUES)
    wanted = torch.cat([t.chunk(size, 2)[rank] for t in (queries, keys, values)], 2)
    there = torch.equal(torch.cat(gathered, 2), wanted)
    returned = heads_to_tokens(gathered, group, QUERIES_KEYS_VALUES)
    return there and all(torch.equal(r, t) for r, t in zip(returned, local, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_keys_and_values_in_one_tensor_are_scattered_each_by_themselves(ranks: RankPool, size: int) -> None:
    assert ranks.run(scatter_parts, num_ranks=size) == [True] * size


def scatter_shares() -> bool:
    """Send two shares of the heads there and back; whether each held its half of each part's heads."""
    state = ParallelState.create(torch.distributed.get_world_size())
    rank, size, group = state.rank, state.world_size, state.sequence_parallel_group
    queries, keys, values = whole(16), whole(8) + 1000, whole(8) + 2000
    local = [t.chunk(size)[rank] for t in (queries, torch.cat([keys, values], 2))]
    back, there = SharesToTokens(group, QUERIES_KEYS_VALUES, 2), True
    for share, exchange in enumerate(start_shares_to_heads(local, group, QUERIES_KEYS_VALUES, 2)):
        gathered = exchange()
        wanted = torch.cat([t.chunk(size, 2)[rank].chunk(2, 2)[share] for t in (queries, keys, values)], 2)
        there = there and torch.equal(torch.cat(gathered, 2), wanted)
        back.start(gathered)
    return there and all(torch.equal(r, t) for r, t in zip(back(), local, strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_heads_travel_in_shares(ranks: RankPool, size: int) -> None:
    assert ranks.run(scatter_shares, num_ranks=size) == [True] * size


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_travel_the_other_way(ranks: RankPool, size: int) -> None:
    for rank, (of_tokens, of_heads) in enumerate(ranks.run(differentiate, num_ranks=size)):
        assert torch.equal(of_tokens, whole(4).chunk(size)[rank])
        assert torch.equal(of_heads, whole(4).chunk(size, 2)[rank])


@pytest.mark.parametrize("heads, size, expected", [(4, 2, 4), (2, 4, 4), (1, 4, 4), (3, 2, 6), (4, 1, 4)])
def test_key_value_heads_are_repeated_until_the_ranks_divide_them(heads: int, size: int, expected: int) -> None:
    keys_and_values = torch.cat([whole(heads), whole(heads)], 2)
    assert repeat_key_value_heads(keys_and_values, size).shape[2] == 2 * expected


def test_the_gradients_of_repeated_heads_are_summed() -> None:
    keys_and_values = whole(4).requires_grad_()
    repeat_key_value_heads(keys_and_values, 4).sum().backward()
    assert keys_and_values.grad is not None
    assert torch.equal(keys_and_values.grad, torch.full_like(keys_and_values, 2.0))
