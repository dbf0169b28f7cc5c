#!/usr/bin/env python3
"""Measure the time from opening a large corpus to its first sample.

    python benchmarks/data_index.py

The document lengths of the corpus are drawn from a log-normal distribution. Its .bin is a sparse file of the right
size, which uses no disk space. "open" reads and checks the index; "compiled" and "numpy" compute which tokens belong to
which sample, and must agree; "order" is everything that a first start computes, including epochs and shuffles; "cached"
is a later start.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import REPOSITORY, Column, Row, Table, git_commit
from megatron.data.index_file import write_index
from megatron.data.index_helpers import compiled_helpers, numpy_sample_index
from megatron.data.indexed_dataset import IndexedDataset, index_path, token_path
from megatron.data.sample_order import OrderPlan, build_order, cached_order

NAME = "data_index"
COLUMNS = (
    Column("seq_length", "seq_length", width=10),
    Column("epochs", "epochs"),
    Column("samples", "samples", ","),
    Column("open_seconds", "open s", ".2f"),
    Column("compiled_seconds", "compiled s", ".2f"),
    Column("numpy_seconds", "numpy s", ".2f"),
    Column("order_seconds", "order s", ".2f"),
    Column("cached_seconds", "cached s", ".2f"),
)
T = TypeVar("T")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10**6, help="[%(default)s]")
    parser.add_argument("--tokens", type=float, default=1e9, help="[%(default)s]")
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[2048, 131072], help="[%(default)s]")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3], help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks") / NAME, help="writes OUTPUT.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    table, rows, commit = Table(COLUMNS), [], git_commit(REPOSITORY)
    with tempfile.TemporaryDirectory() as name:
        prefix = make_corpus(Path(name) / "corpus", arguments.documents, arguments.tokens)
        num_tokens = IndexedDataset(prefix).num_tokens
        print(f"commit {commit}, {arguments.documents:,} documents, {num_tokens:,} tokens\n{table.heading()}")
        for seq_length in arguments.seq_lengths:
            for epochs in arguments.epochs:
                rows.append(measure(prefix, seq_length, epochs))
                print(table.line(rows[-1]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": NAME, "commit": commit, "documents": arguments.documents, "rows": rows}
    arguments.output.with_name(arguments.output.name + ".json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


def make_corpus(prefix: Path, num_documents: int, num_tokens: float) -> Path:
    """Write an index of documents, and a sparse .bin without data."""
    lengths = np.random.default_rng(0).lognormal(0, 1, num_documents)
    sizes = np.maximum(lengths * (num_tokens / lengths.sum()), 1).astype(np.int32)
    with index_path(prefix).open("wb") as file:
        write_index(file, np.uint16, sizes, np.arange(num_documents + 1, dtype=np.int64))
    with token_path(prefix).open("wb") as file:
        file.truncate(2 * int(sizes.sum(dtype=np.int64)))
    return prefix


def measure(prefix: Path, seq_length: int, epochs: int) -> Row:
    """Time each step. Raises AssertionError if compiled and numpy indices differ."""
    dataset, open_seconds = timed(lambda: IndexedDataset(prefix))
    plan = OrderPlan(dataset.document_sizes, range(dataset.num_documents), seq_length, 1, epochs)
    order, order_seconds = timed(lambda: build_order(plan))
    words = (plan.document_sizes, order.document_index, seq_length, epochs, plan.tokens_per_epoch)
    in_numpy, numpy_seconds = timed(lambda: numpy_sample_index(*words))
    row = {"seq_length": seq_length, "epochs": epochs, "samples": len(order.shuffle_index)}
    row |= {"open_seconds": open_seconds, "numpy_seconds": numpy_seconds, "order_seconds": order_seconds}
    helpers = compiled_helpers()
    if helpers is not None:
        compiled, row["compiled_seconds"] = timed(lambda: helpers.build_sample_index(*words))
        np.testing.assert_array_equal(compiled, in_numpy)
    cache = prefix.parent / "cache"
    cached_order(plan, cache)
    _, row["cached_seconds"] = timed(lambda: cached_order(plan, cache))
    return row


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return the result of `work`, and its seconds."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
