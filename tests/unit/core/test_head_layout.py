"""Which heads and rows each rank attends with, and which key/value heads its query heads find there."""

from math import lcm

import pytest
import torch

from megatron.core.collectives import (
    differentiable_heads_to_tokens,
    differentiable_tokens_to_heads,
    heads_to_tokens,
    tokens_to_heads,
)
from megatron.core.head_layout import HeadLayout

LAYOUTS = [
    HeadLayout(heads, key_value_heads, ranks)
    for heads in (1, 2, 5, 6, 8, 12, 14, 24, 28)
    for key_value_heads in range(1, heads + 1)
    for ranks in range(1, 20)
    if heads % key_value_heads == 0
]


@pytest.mark.parametrize("heads", [1, 2, 5, 6, 8, 12, 14, 24, 28])
def test_every_rank_s_query_heads_read_their_own_key_value_head(heads):
    for layout in (layout for layout in LAYOUTS if layout.num_heads == heads):
        key_value_heads = layout.num_key_value_heads
        t = torch.arange(key_value_heads).view(1, 1, -1, 1)
        repeated, values = layout.repeated_keys_and_values(torch.cat([t, t], 2)).flatten().chunk(2)
        assert torch.equal(repeated, values)
        for of_share in repeated.chunk(layout.num_row_shares):
            read = of_share.repeat_interleave(layout.queries_per_key)
            assert torch.equal(read, torch.arange(heads) // (heads // key_value_heads))
        assert all(n % layout.queries_per_key == 0 for n in layout.heads_of_groups)


def test_ranks_that_divide_the_heads_share_them_evenly():
    for layout in LAYOUTS:
        heads, key_value_heads, ranks = layout.num_heads, layout.num_key_value_heads, layout.num_ranks
        if heads % ranks == 0:
            assert layout.heads_of_groups == (heads // ranks,) * ranks
            assert layout.largest_num_heads == heads
            assert layout.largest_num_key_value_heads == lcm(key_value_heads, ranks)


def test_every_row_of_every_head_is_some_rank_s():
    for layout in LAYOUTS:
        assert sum(layout.heads_of_groups) == layout.num_heads
        for chunk in (layout.num_ranks, 3 * layout.num_ranks, 12 * layout.num_ranks):
            shares = [layout.rows(rank) for rank in range(0, layout.num_ranks, layout.num_groups)]
            rows = [row for share in shares for first, last in share.spans(chunk) for row in range(first, last)]
            assert sorted(rows) == list(range(chunk))
            assert {share.count(chunk) for share in shares} == {len(rows) // len(shares)}
            assert all(sum(last - first for first, last in s.spans(chunk)) == s.count(chunk) for s in shares)


@pytest.mark.parametrize("num_shares", [2, 3, 8])
def test_the_shares_of_rows_are_the_same_work_under_a_causal_mask(num_shares):
    layout = HeadLayout(1, 1, num_shares)
    keys_seen = {
        sum(row + 1 for first, last in layout.rows(rank).spans(12 * num_shares) for row in range(first, last))
        for rank in range(num_shares)
    }
    assert len(keys_seen) == 1


def test_half_of_a_share_s_rows_are_tokens_of_its_own_ranks():
    for layout in LAYOUTS:
        tokens = 4 * layout.num_groups  # of the ranks of one share
        for share in range(layout.num_row_shares):
            spans = layout.rows(share * layout.num_groups).spans(tokens * layout.num_row_shares)
            own = {row for first, last in spans for row in range(first, last) if row // tokens == share}
            assert len(own) == tokens // (1 if 2 * share == layout.num_row_shares - 1 else 2)


@pytest.mark.parametrize(
    "heads, key_value_heads, ranks, text",
    [
        (28, 28, 8, "28 heads over 8 ranks: 4 on 4 ranks, 3 on 4; 12.5% of attention's time is lost"),
        (28, 4, 8, "28 heads over 8 ranks: 7 on each, with 1/2 of each chunk's queries"),
        (4, 4, 32, "4 heads over 32 ranks: 1 on each, with 1/8 of each chunk's queries"),
        (28, 28, 32, "28 heads over 32 ranks: 2 on 24 ranks, 1 on 8, with 1/2 of each chunk's queries; 12.5% of"),
        (32, 8, 3, "32 heads over 3 ranks: 32 on each, with 1/3 of each chunk's queries"),
        (32, 8, 8, "32 heads over 8 ranks: 4 on each"),
    ],
)
def test_a_layout_says_what_each_rank_has(heads, key_value_heads, ranks, text):
    assert str(HeadLayout(heads, key_value_heads, ranks)).startswith(text)


@pytest.mark.parametrize("key_value_heads, ranks, copies", [(1, 4, 4), (2, 4, 2), (3, 2, 2), (4, 6, 3), (4, 2, 1)])
def test_the_gradients_of_the_copies_are_summed(key_value_heads, ranks, copies):
    t = torch.randn(5, 2, 2 * key_value_heads, 3, dtype=torch.float64, requires_grad=True)
    repeated = HeadLayout(12, key_value_heads, ranks).repeated_keys_and_values(t)
    gradient = torch.randn_like(repeated)
    repeated.backward(gradient)
    torch.testing.assert_close(t.grad, gradient.unflatten(2, (2 * key_value_heads, copies)).sum(3))


def test_the_gradients_of_the_shares_are_summed():
    t = torch.randn(5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    HeadLayout(1, 1, 4).repeated_keys_and_values(t).sum().backward()
    assert torch.equal(t.grad, torch.full_like(t, 4.0))


def test_heads_that_the_ranks_divide_are_not_copied():
    t = torch.randn(5, 2, 4, 3)
    assert HeadLayout(4, 2, 2).repeated_keys_and_values(t) is t


@pytest.mark.parametrize(
    "exchange", [tokens_to_heads, heads_to_tokens, differentiable_tokens_to_heads, differentiable_heads_to_tokens]
)
def test_without_a_group_tensors_come_back_as_they_are(exchange):
    tensors = [torch.randn(4, 1, heads, 2) for heads in (4, 2, 2)]
    assert all(got is given for got, given in zip(exchange(tensors, None, HeadLayout(4, 4)), tensors, strict=True))
