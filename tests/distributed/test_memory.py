"""With offloading, the bytes on the compute device do not grow with the sequence.

The peak of a training step (forward and backward of the second step, when gradients and host buffers exist) is metered
at 6 chunks and at 48 chunks of the same size: with fewer the double buffers are not all in use yet.
Weights, gradients and the step's inputs are not counted.
"""

from dataclasses import replace

import pytest

from megatron.config import Recompute
from megatron.fpdt.memory_model import StreamShape
from tests.distributed.live_bytes import LiveBytesMeter, OperationNames
from tests.distributed.model_case import Case, build, local_inputs, model_config
from tests.distributed.rank_pool import RankPool

CHUNK = 16
SHORT, LONG = 6 * CHUNK, 48 * CHUNK
GROWTH_ALLOWED = 1.05
COPIES = {"copy_", "clone", "_to_copy"}
VIEWS = {"alias", "as_strided", "detach", "select", "slice", "split", "split_with_sizes", "transpose", "view"}

LLAMA = Case(family="llama", num_key_value_heads=4, sequence_length=SHORT, max_positions=LONG)
GPT = replace(LLAMA, family="gpt", positions="learned", num_key_value_heads=8)


def peak_bytes_of_a_step(case: Case) -> int:
    """Return this rank's peak of live device bytes during one forward and backward pass."""
    model, parallel_state, layout = build(case)
    positions = layout.owned_positions(parallel_state.sequence_parallel_rank)
    inputs = local_inputs(case, parallel_state.data_parallel_rank, positions)
    model(*inputs).backward()

    parameters = list(model.parameters())
    known = [*parameters, *(parameter.grad for parameter in parameters), *model.buffers(), *inputs]
    pool = model.execution.store.pool if case.chunk_length else None
    settle_seconds = 0.01 if case.num_ranks > 1 else 0.0
    with LiveBytesMeter(known, pool.owns if pool else lambda _: False, settle_seconds) as meter:
        model(*inputs).backward()
    return meter.peak_bytes


def operations_on_the_host_tier(case: Case) -> set[str]:
    """Return the operations of one step that touch a tensor of this rank's host pool."""
    model, parallel_state, layout = build(case)
    positions = layout.owned_positions(parallel_state.sequence_parallel_rank)
    with OperationNames(model.execution.store.pool.owns) as operations:
        model(*local_inputs(case, parallel_state.data_parallel_rank, positions)).backward()
    return operations.names


def peak_bytes_of_the_host_tier(case: Case) -> int:
    """Return the peak bytes of this rank's host pool in one step."""
    model, parallel_state, layout = build(case)
    positions = layout.owned_positions(parallel_state.sequence_parallel_rank)
    model(*local_inputs(case, parallel_state.data_parallel_rank, positions)).backward()
    return int(model.execution.store.pool.peak_used_bytes)


def peaks_at_both_lengths(ranks: RankPool, case: Case) -> tuple[int, int]:
    """Return the largest rank's peak at the short and at the long sequence."""
    short, long = (
        max(ranks.run(peak_bytes_of_a_step, replace(case, sequence_length=length), num_ranks=case.num_ranks))
        for length in (SHORT, LONG)
    )
    return short, long


@pytest.mark.parametrize(
    "case",
    [LLAMA, GPT, replace(LLAMA, sequence_parallel_size=2, num_layers=1)],
    ids=["llama", "gpt", "llama on 2 ranks"],
)
def test_device_bytes_do_not_grow_with_the_sequence(ranks: RankPool, case: Case) -> None:
    short, long = peaks_at_both_lengths(ranks, replace(case, chunk_length=CHUNK, offloading=True))
    assert long <= GROWTH_ALLOWED * short, f"{short} bytes at {SHORT} tokens, {long} at {LONG}: x{long / short:.3f}"


def test_device_bytes_do_not_grow_with_the_depth(ranks: RankPool) -> None:
    case = replace(LLAMA, chunk_length=CHUNK, offloading=True)
    shallow, deep = (ranks.run(peak_bytes_of_a_step, replace(case, num_layers=n), num_ranks=1)[0] for n in (2, 8))
    assert deep <= GROWTH_ALLOWED * shallow, f"{shallow} bytes with 2 layers, {deep} with 8"


@pytest.mark.parametrize("num_ranks, rows", [(1, 1), (2, 3)])
def test_norms_of_queries_and_keys_hold_the_projection_of_each_row_under_way(
    ranks: RankPool, num_ranks: int, rows: int
) -> None:
    """As the planner reckons. LayerNorm is one operation on CPUs too, where RMSNorm is many that hold more."""
    chunk = 128
    case = Case(
        family="gpt", positions=1.0, chunk_length=chunk, offloading=True, sequence_parallel_size=num_ranks,
        sequence_length=6 * chunk, num_key_value_heads=2,
    )  # fmt: skip
    plain, normalised = (
        max(ranks.run(peak_bytes_of_a_step, replace(case, switches=switches), num_ranks=num_ranks))
        for switches in ((), ("qk_layernorm",))
    )
    projections = rows * (chunk // num_ranks) * (8 + 2 * 2) * 16 * 8
    assert 1 <= (normalised - plain) / projections < 1.2


@pytest.mark.parametrize("recompute", [Recompute.ALL, Recompute.KV])
@pytest.mark.parametrize("num_heads, num_key_value_heads", [(7, 7), (14, 7), (6, 2), (2, 1)])
def test_the_largest_of_ranks_that_do_not_divide_the_heads_stores_what_the_model_estimates(
    ranks: RankPool, num_heads: int, num_key_value_heads: int, recompute: Recompute
) -> None:
    case = replace(
        LLAMA, num_heads=num_heads, num_key_value_heads=num_key_value_heads, sequence_parallel_size=4,
        chunk_length=CHUNK, offloading=True, recompute=recompute,
    )  # fmt: skip
    shape = StreamShape.of(model_config(case), CHUNK, 4, case.batch_size, element_size=8)
    used = ranks.run(peak_bytes_of_the_host_tier, case, num_ranks=4)
    assert max(used) == pytest.approx(shape.tier_bytes(1, recompute), rel=0.01)


@pytest.mark.parametrize("chunk_length", [0, CHUNK], ids=["plain", "fpdt without offloading"])
def test_the_meter_sees_growth_where_there_is_some(ranks: RankPool, chunk_length: int) -> None:
    short, long = peaks_at_both_lengths(ranks, replace(LLAMA, chunk_length=chunk_length, num_layers=1))
    assert long > 2 * short


@pytest.mark.parametrize("case", [LLAMA, replace(GPT, sequence_parallel_size=2)], ids=["llama", "gpt on 2 ranks"])
def test_tensors_of_the_host_tier_are_copied_and_never_computed_with(ranks: RankPool, case: Case) -> None:
    case = replace(case, chunk_length=CHUNK, offloading=True)
    for names in ranks.run(operations_on_the_host_tier, case, num_ranks=case.num_ranks):
        assert names & COPIES
        assert names <= COPIES | VIEWS
