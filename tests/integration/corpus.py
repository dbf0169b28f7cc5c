"""A small dataset that a model can learn from, and damaged copies of it."""

import shutil
from pathlib import Path

import numpy as np

from megatron.data.indexed_dataset import IndexedDatasetWriter

VOCAB_SIZE = 63  # and one more id that ends a document
STEPS = (1, 1, 1, 2, 5)


def write_corpus(prefix: Path, num_documents: int = 200) -> Path:
    """Write PREFIX.bin and PREFIX.idx: documents that count upwards, by one more often than by two or five."""
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(num_documents):
            tokens = np.cumsum(random.choice(STEPS, random.integers(100, 400))) % VOCAB_SIZE
            writer.add_document(np.append(tokens, VOCAB_SIZE))
    return prefix


def copy_corpus(prefix: Path, target: Path) -> Path:
    """Copy both files of a dataset."""
    for ending in (".bin", ".idx"):
        shutil.copyfile(f"{prefix}{ending}", f"{target}{ending}")
    return target


def truncate(path: Path, num_bytes: int) -> None:
    """Cut the last `num_bytes` off a file."""
    path.write_bytes(path.read_bytes()[:-num_bytes])
