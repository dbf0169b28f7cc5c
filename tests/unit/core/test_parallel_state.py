import pytest

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
