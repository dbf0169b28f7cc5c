"""Replicated key/value heads: after the all-to-all a rank's query heads find the key/value heads that they read."""

from math import lcm

import pytest
import torch

from megatron.core.collectives import (
    differentiable_heads_to_tokens,
    differentiable_tokens_to_heads,
    heads_to_tokens,
    repeat_key_value_heads,
    tokens_to_heads,
)

SPLITS = [
    (heads, key_value_heads, ranks)
    for heads in (1, 2, 4, 6, 8, 12, 24)
    for key_value_heads in range(1, heads + 1)
    for ranks in range(1, heads + 1)
    if heads % key_value_heads == 0 and heads % ranks == 0
]


@pytest.mark.parametrize("heads, key_value_heads, ranks", SPLITS)
def test_every_rank_s_query_heads_read_their_own_key_value_head(heads, key_value_heads, ranks):
    t = torch.arange(key_value_heads).view(1, 1, -1, 1)
    repeated, values = repeat_key_value_heads(torch.cat([t, t], 2), ranks).flatten().chunk(2)
    assert torch.equal(repeated, values)
    assert len(repeated) == lcm(key_value_heads, ranks)
    for rank in range(ranks):
        queries = torch.arange(heads).chunk(ranks)[rank]
        held = repeated.chunk(ranks)[rank]
        read = held.repeat_interleave(len(queries) // len(held))
        assert torch.equal(read, queries // (heads // key_value_heads))


@pytest.mark.parametrize("key_value_heads, ranks, copies", [(1, 4, 4), (2, 4, 2), (3, 2, 2), (4, 6, 3), (4, 2, 1)])
def test_the_gradients_of_the_copies_are_summed(key_value_heads, ranks, copies):
    t = torch.randn(5, 2, 2 * key_value_heads, 3, dtype=torch.float64, requires_grad=True)
    repeated = repeat_key_value_heads(t, ranks)
    gradient = torch.randn_like(repeated)
    repeated.backward(gradient)
    torch.testing.assert_close(t.grad, gradient.unflatten(2, (2 * key_value_heads, copies)).sum(3))


def test_heads_that_the_ranks_divide_are_not_copied():
    t = torch.randn(5, 2, 4, 3)
    assert repeat_key_value_heads(t, 2) is t


@pytest.mark.parametrize(
    "exchange", [tokens_to_heads, heads_to_tokens, differentiable_tokens_to_heads, differentiable_heads_to_tokens]
)
def test_without_a_group_tensors_come_back_as_they_are(exchange):
    tensors = [torch.randn(4, 1, heads, 2) for heads in (4, 2, 2)]
    assert all(got is given for got, given in zip(exchange(tensors, None), tensors, strict=True))
