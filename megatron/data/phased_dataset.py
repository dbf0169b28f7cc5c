"""Samples of several lengths, phase after phase."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from megatron.data.blended_dataset import SampleDataset
from megatron.data.tokens import Tokens


class PhasedDataset:
    """The samples of `datasets`, one after the other; samples of number k begin at `first_samples[k]`."""

    def __init__(self, datasets: Sequence[SampleDataset], first_samples: Sequence[int]) -> None:
        self._datasets, self._first_samples = datasets, first_samples

    def __len__(self) -> int:
        return self._first_samples[-1] + len(self._datasets[-1])

    def __getitem__(self, index: int) -> Tokens:
        """Return sample `index`, of one token more than the length of its phase."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        phase = bisect_right(self._first_samples, index) - 1
        return self._datasets[phase][index - self._first_samples[phase]]
