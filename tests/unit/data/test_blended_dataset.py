import numpy as np
import pytest

from megatron.data.blended_dataset import BlendedDataset


class Constant:
    """A dataset whose sample k is [value, k]."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self.value, index])


def test_a_sample_comes_from_the_dataset_and_place_that_the_indices_name() -> None:
    blend = BlendedDataset([Constant(7), None, Constant(9)], np.array([2, 0, 2], np.int16), np.array([0, 0, 1]))
    assert [blend[k].tolist() for k in range(len(blend))] == [[9, 0], [7, 0], [9, 1]]
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of a blend of 3"):
            blend[index]
