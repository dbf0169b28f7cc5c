"""Small datasets on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_dataset import IndexedDatasetWriter

MakeDataset = Callable[..., str]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Write a dataset of documents of the given sizes, whose tokens count up from `first`; return its prefix."""

    def make(sizes: Sequence[int], name: str = "data", first: int = 0, dtype: type = np.int32) -> str:
        prefix = str(tmp_path / name)
        with IndexedDatasetWriter(prefix, dtype) as writer:
            for size in sizes:
                writer.add_document(np.arange(first, first + size))
                first += size
        return prefix

    return make
