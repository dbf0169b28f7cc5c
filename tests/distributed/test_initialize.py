"""What the ranks agree on at the start."""

import torch
import torch.distributed as dist

from megatron.initialize import GIB, least_over_ranks, usable_device_bytes
from tests.distributed.rank_pool import RankPool

HOST, DEVICE = [70 * 2**30, 50 * 2**30, 60 * 2**30], [80 * 2**30, 40 * 2**30, 24 * 2**30]


def least(sizes: list[list[int]]) -> tuple[int, int, int]:
    """What one rank is told, its own sizes being those at its place."""
    host, device = (each[dist.get_rank()] for each in sizes)
    return least_over_ranks(host, device, torch.device("cpu"))


def test_every_rank_is_told_of_the_least_memory_of_any() -> None:
    with RankPool() as pool:
        assert pool.run(least, [HOST, DEVICE], num_ranks=3) == [(HOST[1], DEVICE[2], DEVICE[0])] * 3


def test_memory_that_other_processes_use_is_not_planned_with() -> None:
    assert usable_device_bytes(free=79 * GIB, total=80 * GIB) == 80 * GIB, "CUDA's own use"
    assert usable_device_bytes(free=40 * GIB, total=80 * GIB) == 42 * GIB
