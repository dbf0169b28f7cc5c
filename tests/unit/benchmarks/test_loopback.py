"""A rank among twins: what its collectives answer is what real ranks get that all hold the same."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.loopback import LoopbackGroup, init_loopback
from megatron.core.parallel_state import ParallelState
from tests.distributed.rank_pool import RankPool

SIZE = 4


def answers(rank: int) -> list[Tensor]:
    """What every kind of collective gives to `rank` of four ranks that all hold the same numbers."""
    assert dist.get_world_size() == SIZE
    held = torch.arange(8, dtype=torch.float32) + 1
    summed, largest, sent = held.clone(), held.clone(), held.clone()
    dist.all_reduce(summed)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.broadcast(sent, src=1)
    gathered, listed = torch.empty(SIZE * 8), [torch.empty(8) for _ in range(SIZE)]
    dist.all_gather_into_tensor(gathered, held)
    dist.all_gather(listed, held)
    in_place = torch.zeros(SIZE * 8)
    own = in_place.chunk(SIZE)[rank]
    own.copy_(held)
    dist.all_gather_into_tensor(in_place, own)
    scattered, exchanged = torch.empty(2), torch.empty(8)
    dist.reduce_scatter_tensor(scattered, held.clone())
    work = dist.all_to_all_single(exchanged, held, async_op=True)
    work.wait()
    assert work.is_completed()
    objects: list[object] = [None] * SIZE
    dist.all_gather_object(objects, {"held": 8})
    assert objects == [{"held": 8}] * SIZE
    dist.barrier()
    return [summed, largest, sent, gathered, *listed, in_place, scattered, exchanged]


def answers_of_a_real_rank() -> list[Tensor]:
    return answers(dist.get_rank())


@pytest.fixture(params=[0, 3])
def rank(request):
    """A rank of a world of twins."""
    init_loopback(SIZE, request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_rank_among_twins_gets_what_real_ranks_get(ranks: RankPool, rank: int) -> None:
    real = ranks.run(answers_of_a_real_rank, num_ranks=SIZE)[rank]
    for twin, answer in zip(answers(rank), real, strict=True):
        torch.testing.assert_close(twin, answer, rtol=0, atol=0)


def test_its_groups_are_those_of_the_rank(rank: int) -> None:
    state = ParallelState.create(2)
    assert (state.sequence_parallel_rank, state.data_parallel_rank) == (rank % 2, rank // 2)
    assert dist.get_world_size(state.sequence_parallel_group) == 2


def test_bytes_of_other_ranks_are_counted_as_rings_move_them(rank: int) -> None:
    held = torch.zeros(8)  # 32 bytes
    before = LoopbackGroup.received_bytes
    dist.all_to_all_single(torch.empty(8), held)  # three quarters come from others
    dist.all_reduce(held)  # twice as many
    dist.all_gather([torch.empty(8) for _ in range(SIZE)], held)  # three times the shard
    assert LoopbackGroup.received_bytes - before == 24 + 48 + 96


@pytest.mark.parametrize(
    "ask, what",
    [
        (lambda: dist.all_reduce(torch.ones(1), dist.ReduceOp.PRODUCT), "reduction"),
        (lambda: dist.all_to_all_single(torch.ones(4), torch.ones(4), [1] * 4, [1] * 4), "unequal parts"),
    ],
)
def test_what_has_no_answer_is_refused(rank, ask, what):
    with pytest.raises(NotImplementedError, match=what):
        ask()
