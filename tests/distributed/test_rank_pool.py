"""The harness itself: results in order, fresh worlds, and failures that say what happened."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.rank_pool import RankFailure, RankPool


def describe_world(offset: int) -> tuple[int, int, int, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total), torch.get_num_threads()


def return_tensor() -> torch.Tensor:
    return torch.full((3,), float(dist.get_rank()), dtype=torch.float64)


def fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank has had enough")
    dist.barrier()


def die_on_first_rank() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def sleep_on_first_rank() -> None:
    if dist.get_rank() == 0:
        time.sleep(30)


def test_results_come_in_rank_order_from_worlds_of_any_size(ranks: RankPool) -> None:
    assert ranks.run(describe_world, 10, num_ranks=2) == [(0, 2, 21, 1), (1, 2, 21, 1)]
    assert ranks.run(describe_world, 0, num_ranks=1) == [(0, 1, 0, 1)]
    assert [total for _, _, total, _ in ranks.run(describe_world, 1, num_ranks=4)] == [10] * 4


def test_tensors_come_back_by_value(ranks: RankPool) -> None:
    assert [float(tensor.sum()) for tensor in ranks.run(return_tensor, num_ranks=2)] == [0.0, 3.0]


def test_a_failing_rank_raises_its_own_traceback_and_the_pool_recovers() -> None:
    with RankPool() as pool:
        with pytest.raises(RankFailure, match=r"rank 1 of 2 failed:(.|\n)*the last rank has had enough"):
            pool.run(fail_on_last_rank, num_ranks=2)
        assert len(pool.run(describe_world, 0, num_ranks=2)) == 2


def test_a_rank_that_dies_is_reported() -> None:
    with RankPool() as pool, pytest.raises(RankFailure, match="rank 0 of 2 failed:\nthe process ended"):
        pool.run(die_on_first_rank, num_ranks=2)


def test_a_late_rank_ends_the_call() -> None:
    with RankPool() as pool:
        pool.run(describe_world, 0, num_ranks=2)
        with pytest.raises(RankFailure, match=r"did not finish within 1 s"):
            pool.run(sleep_on_first_rank, num_ranks=2, timeout_seconds=1.0)
