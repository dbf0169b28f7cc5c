from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron.core.parallel_state import ParallelState


def test_without_torch_distributed_the_world_is_this_process():
    state = ParallelState.create()
    assert state == ParallelState()
    assert (state.world_size, state.rank, state.sequence_parallel_size, state.data_parallel_size) == (1, 0, 1, 1)


def test_groups_of_one_need_no_communicator():
    state = ParallelState.create()
    assert state.sequence_parallel_group is None
    assert state.data_parallel_group is None


def test_a_size_that_does_not_divide_the_ranks_is_refused_with_what_would():
    with pytest.raises(ValueError, match=r"--ds-sequence-parallel-size \(3\) must divide the 1 ranks; .* divisor of 1"):
        ParallelState.create(3)


@pytest.mark.parametrize("backend, has_priority", [("nccl", True), ("gloo", False)])
def test_the_all_to_all_takes_priority_over_compute_on_gpus(monkeypatch, backend, has_priority):
    created = []

    def new_group(ranks, timeout, pg_options):
        created.append((ranks, timeout, pg_options and vars(pg_options)))
        return object()

    for name, value in {"is_initialized": True, "get_world_size": 4, "get_rank": 0, "get_backend": backend}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=SimpleNamespace), raising=False)
    limit = timedelta(seconds=5)
    ParallelState.create(2, limit)
    options = {"is_high_priority_stream": True, "_timeout": limit} if has_priority else None
    assert created == [
        ([0, 1], limit, options), ([2, 3], limit, options), ([0, 2], limit, None), ([1, 3], limit, None),
    ]  # fmt: skip
