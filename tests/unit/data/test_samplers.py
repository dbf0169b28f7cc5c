import pytest

from megatron.data.samplers import BatchSampler


@pytest.mark.parametrize(
    "size, micro_batch, num_microbatches", [(1, 24, 1), (2, 3, 4), (3, 1, 8), (4, 6, 1), (1, 1, 24)]
)
def test_a_step_takes_the_same_samples_in_every_layout(size: int, micro_batch: int, num_microbatches: int) -> None:
    ranks = [BatchSampler(micro_batch, rank, size, num_microbatches) for rank in range(size)]
    assert ranks[0].global_batch_size == 24
    taken = [k for rank in ranks for indices in rank.step(48) for k in indices]
    assert sorted(taken) == list(range(48, 72))


def test_a_microbatch_follows_the_formula() -> None:
    sampler = BatchSampler(micro_batch_size=2, data_parallel_rank=1, data_parallel_size=3, num_microbatches=2)
    assert sampler.step(100) == [range(102, 104), range(108, 110)]


def test_resuming_gives_the_same_samples_as_an_uninterrupted_run() -> None:
    sampler = BatchSampler(2, 0, 2, 3)
    straight = list(sampler.microbatches(0, 100))
    assert straight[3 * 4 :] == list(sampler.microbatches(4 * 12, 100))
    assert len(straight) == 8 * 3


def test_a_microbatch_outside_the_step_is_an_error() -> None:
    with pytest.raises(IndexError, match="microbatch 2 of a step that has 2"):
        BatchSampler(1, 0, 1, 2).microbatch(0, 2)
