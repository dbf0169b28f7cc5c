#!/usr/bin/env python3
"""Concatenate datasets (PREFIX.bin and PREFIX.idx) into one.

    python tools/merge_datasets.py --input data/a data/b --output-prefix data/all
    python tools/merge_datasets.py --input data/parts --output-prefix data/all       all datasets of a folder, by name

All must have the same token dtype. One block at a time is in memory, and the output appears only when it is complete.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, index_path
from megatron.data.output_names import check_output_name
from megatron.ranks.interrupts import run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, or folders of datasets, in this order")
    parser.add_argument("--output-prefix", required=True, help="the files are PREFIX.bin and PREFIX.idx")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        merge(find_prefixes(arguments.input), Path(arguments.output_prefix))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_prefixes(names: Sequence[str]) -> list[Path]:
    """Return the prefixes named, with folders expanded in order of name. DataError if a folder has none."""
    prefixes: list[Path] = []
    for name in names:
        folder = Path(name)
        if not os.path.isdir(folder):
            prefixes.append(folder)
            continue
        found = sorted({path.with_suffix("") for path in folder.iterdir() if path.suffix in (".bin", ".idx")})
        if not found:
            raise DataError(f"--input ({name}) is a folder without .bin and .idx files; name one that holds datasets.")
        prefixes += found
    return prefixes


def merge(prefixes: Sequence[Path], output: Path) -> None:
    """Write the documents of all `prefixes` to `output`. Raises DataError before anything is written."""
    check_output_name(index_path(output), "--output-prefix")
    for prefix in prefixes:
        if prefix.absolute() == output.absolute():
            raise DataError(f"--output-prefix ({output}) is among the datasets to merge; name another.")
    sources = [IndexedDataset(prefix) for prefix in prefixes]
    output.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(output, sources[0].dtype) as writer:
        for source in sources:
            writer.require_same_dtype(source)
        for source in sources:
            writer.add_dataset(source)
            print(f"{source.prefix}: {source.num_documents} documents, {source.num_tokens} tokens")
    print(f"{output}: {writer.num_documents} documents, {writer.num_tokens} tokens, {writer.dtype.name}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
