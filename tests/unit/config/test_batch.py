"""Batch sizes that follow from the number of ranks."""

from megatron.config import accumulation_steps, data_parallel_size, default_batch_notes, global_batch_size
from tests.unit.config.commands import parsed


def test_sequence_parallel_ranks_share_a_batch():
    config = parsed("--ds-sequence-parallel-size 2 --micro-batch-size 3 --global-batch-size 24")
    assert data_parallel_size(config, 8) == 4
    assert accumulation_steps(config, 8) == 2
    assert global_batch_size(config, 8) == 24


def test_the_default_global_batch_is_one_micro_batch_per_data_parallel_rank():
    config = parsed("--ds-sequence-parallel-size 2 --micro-batch-size 3")
    assert global_batch_size(config, 8) == 12
    assert accumulation_steps(config, 8) == 1


def test_a_batch_that_follows_the_ranks_is_noted_and_one_that_is_given_is_not():
    assert default_batch_notes(parsed("--global-batch-size 24"), 8) == ()
    (note,) = default_batch_notes(parsed("--micro-batch-size 3 --ds-sequence-parallel-size 2"), 8)
    assert note.startswith("--global-batch-size is not given: 12, --micro-batch-size (3) x the data-parallel size (4)")
