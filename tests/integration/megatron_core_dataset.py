"""Write or read datasets with PyPI's megatron-core; run by the Python of an environment that has it.

    PYTHON -I tests/integration/megatron_core_dataset.py write FOLDER    documents.json there to NAME.bin and NAME.idx
    PYTHON -I tests/integration/megatron_core_dataset.py read FOLDER     NAME.bin and NAME.idx to JSON on the output

documents.json holds for each name, which is a dtype's, the documents: lists of sequences, which are lists of values.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import torch

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


def write(folder, name, documents):
    """Write one dataset, its first document as a whole and the others sequence by sequence."""
    dtype = getattr(numpy, name)
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
    first, *others = documents
    builder.add_document([value for sequence in first for value in sequence], [len(sequence) for sequence in first])
    for document in others:
        for sequence in document:
            kind = torch.float64 if dtype in (numpy.float32, numpy.float64) else torch.int64
            builder.add_item(torch.tensor(sequence, dtype=kind))
        builder.end_document()
    builder.finalize(str(folder / f"{name}.idx"))


def read(prefix):
    """Return the dtype, the documents, and what `get` returns for the part of each sequence behind its first token."""
    dataset = IndexedDataset(str(prefix))
    sequences = [dataset[number].tolist() for number in range(len(dataset))]
    bounds = dataset.document_indices.tolist()
    return {
        "dtype": dataset.index.dtype.__name__,
        "documents": [sequences[start:stop] for start, stop in pairwise(bounds)],
        "tails": [dataset.get(k, offset=1).tolist() for k in range(len(dataset)) if len(sequences[k]) > 1],
    }


def main():
    action, folder = sys.argv[1], Path(sys.argv[2])
    names = json.loads((folder / "documents.json").read_text())
    if action == "write":
        for name, documents in names.items():
            write(folder, name, documents)
    else:
        print(json.dumps({name: read(folder / name) for name in names}))


if __name__ == "__main__":
    main()
