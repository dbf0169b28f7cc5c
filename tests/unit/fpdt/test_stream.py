from dataclasses import replace

import pytest
import torch

from megatron.core.head_layout import HeadLayout
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.store import ChunkStore
from megatron.fpdt.stream import Stream
from megatron.ops.attention.reference import ReferenceAttention
from megatron.ops.gradient_sum import GradientSums, accumulation_dtype


def stream_of(chunk_length, slice_length=8192, sequence_parallel_size=1):
    state = ParallelState(sequence_parallel_size=sequence_parallel_size)
    store = ChunkStore(torch.device("cpu"), offloading=False)
    return Stream(store, ReferenceAttention(), state, HeadLayout(1, 1), chunk_length, slice_length)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("slice_length", [1, 3, 8, 100])
def test_slices_cover_a_chunk_in_order_without_gap_or_overlap(num_tokens, slice_length):
    tokens = torch.arange(num_tokens)
    numbers, slices = zip(*stream_of(64, slice_length).numbered_slices(tokens), strict=True)
    parts = [tokens[s] for s in slices]
    assert numbers == tuple(range(len(parts)))
    assert torch.equal(torch.cat(parts), tokens)
    assert all(0 < len(part) <= slice_length for part in parts)


@pytest.mark.parametrize(
    "num_ranks, num_rows, num_tokens, num_key_value_heads, shares",
    [(4, 1, 8, 8, 2), (4, 2, 8, 8, 1), (1, 1, 8, 8, 1), (4, 1, 7, 8, 1), (4, 1, 8, 4, 1), (2, 1, 8, 6, 1)],
    ids=["alone", "with another row", "one rank", "short", "one head per rank", "odd heads per rank"],
)
def test_only_a_row_that_is_alone_exchanges_its_heads_in_shares(
    num_ranks, num_rows, num_tokens, num_key_value_heads, shares
):
    group = object() if num_ranks > 1 else None
    state = ParallelState(sequence_parallel_size=num_ranks, sequence_parallel_group=group)
    heads = HeadLayout(2 * num_key_value_heads, num_key_value_heads, num_ranks)
    stream = replace(stream_of(64, slice_length=8), parallel_state=state, heads=heads)
    assert stream.num_head_shares(num_rows, num_tokens) == shares


def test_layout_counts_the_tokens_of_all_ranks():
    layout = stream_of(16, sequence_parallel_size=4).layout(torch.empty(10, 1, 2))
    assert (layout.sequence_length, layout.chunk_lengths, layout.local_lengths) == (40, (16, 16, 8), (4, 4, 2))


def test_a_chunk_longer_than_the_sequence_is_one_chunk():
    assert stream_of(65536).layout(torch.empty(10, 1, 2)).chunk_lengths == (10,)


@pytest.mark.parametrize(
    "dtype, wide",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_accumulation_is_at_least_fp32(dtype, wide):
    assert accumulation_dtype(dtype) == wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradient_sum_never_writes_into_nor_hands_out_what_it_was_given(dtype):
    parameter = torch.zeros(4, dtype=dtype)
    first, second = torch.ones(4, dtype=dtype), torch.full((4,), 2.0, dtype=dtype)
    total = GradientSums([parameter])
    total.add([first])
    total.add([second])
    (result,) = total.result(scale=torch.tensor(10.0))
    assert result.dtype == dtype
    assert result.tolist() == [30] * 4
    assert first.tolist() == [1] * 4
    assert second.tolist() == [2] * 4
    assert result.data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_gradient_sum_of_one_contribution_is_a_copy():
    given = torch.ones(4)
    total = GradientSums([torch.zeros(4)])
    total.add([given])
    (result,) = total.result()
    result.zero_()
    assert given.tolist() == [1] * 4


def test_gradient_sum_accepts_one_expanded_and_one_shared_gradient():
    shared = torch.ones(3)
    total = GradientSums([torch.zeros(3), torch.zeros(3)])
    total.add([shared, shared])
    total.add([torch.ones(()).expand(3), None])
    assert [t.tolist() for t in total.result()] == [[2] * 3, [1] * 3]


def test_gradient_sum_loses_no_small_contribution_in_bf16():
    total = GradientSums([torch.zeros(1, dtype=torch.bfloat16)])
    for _ in range(1024):
        total.add([torch.ones(1, dtype=torch.bfloat16)])
    assert total.result()[0].item() == 1024, "a sum in bf16 stops growing at 256"


def test_gradient_sum_scales_before_it_rounds_to_half_precision():
    total = GradientSums([torch.zeros(1, dtype=torch.float16)])
    for _ in range(4):
        total.add([torch.full((1,), 60000.0, dtype=torch.float16)])
    assert total.result(scale=torch.tensor(0.25))[0].item() == 60000


def test_a_parameter_without_contributions_has_no_gradient():
    total = GradientSums([torch.zeros(1), torch.zeros(1)])
    total.add([None, torch.ones(1)])
    assert total.result(scale=torch.tensor(2.0))[0] is None
