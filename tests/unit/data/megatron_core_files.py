"""Small datasets that PyPI's megatron-core 0.16.1 wrote, one per type; how to write them again is in
tests/integration/megatron_core_dataset.py."""

import json
from itertools import pairwise
from pathlib import Path

from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

FILES = Path(__file__).with_name("megatron_core")
DOCUMENTS: dict[str, list[list[list[float]]]] = json.loads((FILES / "documents.json").read_text())
"""Documents by the name of the dtype; some of several sequences, some empty."""


def write_with_ours(prefix: Path, name: str) -> None:
    """Write the documents of one type."""
    with IndexedDatasetWriter(prefix, name) as writer:
        for document in DOCUMENTS[name]:
            for sequence in document:
                writer.add_sequence(sequence)  # type: ignore[arg-type]
            writer.end_document()


def read_with_ours(prefix: Path) -> list[list[list[float]]]:
    """Return the documents of a dataset."""
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices.tolist()
    return [[dataset.get(number).tolist() for number in range(start, stop)] for start, stop in pairwise(bounds)]


def contents(prefix: Path) -> tuple[bytes, bytes]:
    """Return the bytes of both files."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
