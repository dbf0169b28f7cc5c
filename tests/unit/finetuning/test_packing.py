"""Every sample is in one sequence, none overflows, and the order is a function of the seed."""

import numpy as np
import pytest

from megatron.finetuning.packing import OPEN_SEQUENCES, pack

CAPACITY = 100


@pytest.mark.parametrize("num_samples", [1, 7, 5000])
def test_every_sample_is_in_one_sequence_that_holds_it(num_samples: int) -> None:
    random = np.random.default_rng(num_samples)
    lengths = random.integers(1, CAPACITY + 1, num_samples)
    order = random.permutation(num_samples)
    packing = pack(lengths, order, CAPACITY)
    assert sorted(packing.samples) == list(range(num_samples))
    totals = [int(lengths[packing.sequence(i)].sum()) for i in range(len(packing))]
    assert min(totals) > 0
    assert max(totals) <= CAPACITY


def test_short_samples_leave_almost_no_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, CAPACITY // 2, 20 * OPEN_SEQUENCES)
    packing = pack(lengths, np.arange(len(lengths)), CAPACITY)
    assert lengths.sum() / (len(packing) * CAPACITY) > 0.99


def test_a_sample_goes_where_it_leaves_the_least_room_and_the_order_is_kept() -> None:
    lengths = np.array([60, 50, 40, 50])
    packing = pack(lengths, np.arange(4), CAPACITY)
    assert [packing.sequence(i).tolist() for i in range(len(packing))] == [[0, 2], [1, 3]]


def test_samples_outside_of_the_order_take_no_part() -> None:
    assert sorted(pack(np.array([10, 500, 20, 30]), np.array([3, 0]), CAPACITY).samples) == [0, 3]
