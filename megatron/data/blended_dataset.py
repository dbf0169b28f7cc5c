"""A blend of several datasets by weight."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.tokens import Tokens


class SampleDataset(Protocol):
    """A fixed number of samples, each of seq_length + 1 tokens, which are read lazily when sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tokens: ...


class BlendedDataset:
    """Sample i is sample `sample_index[i]` of dataset `dataset_index[i]`.

    dataset_index int16 [num_samples] and sample_index int64 [num_samples] come from `build_blending_indices`. A dataset
    from which nothing is drawn may be None.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset | None],
        dataset_index: npt.NDArray[np.int16],
        sample_index: npt.NDArray[np.int64],
    ) -> None:
        self._datasets = datasets
        self._dataset_index = dataset_index
        self._sample_index = sample_index

    def __len__(self) -> int:
        return len(self._dataset_index)

    def __getitem__(self, index: int) -> Tokens:
        """Return sample `index`, of seq_length + 1 tokens."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}")
        dataset = self._datasets[int(self._dataset_index[index])]
        if dataset is None:
            raise IndexError(f"sample {index} belongs to a dataset that was left out of the blend")
        return dataset[int(self._sample_index[index])]
