#!/usr/bin/env python3
"""Measure the speedup of attention where documents in one sequence do not see each other.

    python benchmarks/documents.py
    python benchmarks/documents.py --cut random --num-documents 1 16 256

Runs one streamed block with offloading, forward and backward, on a sequence of one document, then several: equally
long, or cut at random. "x faster" compares the block's time to that of the first row, "attention x faster" the time of
the attention kernels alone, from a trace (on a GPU). Attention's work is proportional to the sum of the squares of the
documents' lengths; "attention share" is that sum over the square of the sequence's length, and what model FLOPs count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.block import OFFLOADED, ModelBlock, measure
from benchmarks.common import (
    TINY_GEOMETRY,
    Column,
    Geometry,
    Report,
    Row,
    add_geometry_flags,
    build_parser,
    geometry_of,
    parse,
    run_script,
    thousands,
)
from megatron.config import Recompute
from megatron.core.documents import Documents

NAME = "documents"
COLUMNS = (
    Column("documents", "documents", "d"),
    Column("cut", "cut"),
    Column("backend", "backend", width=12),
    Column("attention_share", "attention share", ".4f"),
    Column("forward_seconds", "forward s", ".3f"),
    Column("backward_seconds", "backward s", ".3f"),
    Column("faster", "x faster", ".2f"),
    Column("attention_seconds", "attention s", ".3f"),
    Column("attention_faster", "attention x faster", ".2f"),
    Column("model_tflops", "model TFLOP/s", ".0f"),
    Column("times_matmul", "x matmul", ".3f"),
    Column("spread", "spread", ".1%"),
    Column("above_gib", "above GiB", ".2f"),
)
QUICK = {"num_documents": [1, 16]}
TINY = {**TINY_GEOMETRY, "seq_length": 128, "chunk": 48, "num_documents": [1, 4]}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--seq-length", type=int, default=262144, help="tokens [%(default)s]")
    parser.add_argument("--chunk", type=int, default=32768, help="tokens per chunk [%(default)s]")
    parser.add_argument("--num-documents", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024],
                        help="in the sequence [1 4 16 64 256 1024]")  # fmt: skip
    parser.add_argument("--cut", choices=["equal", "random"], default="equal", help="[%(default)s]")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="attention kernels [auto]")
    parser.add_argument("--repeats", type=int, default=2, help="runs timed, after one to warm up [%(default)s]")
    add_geometry_flags(parser, Geometry())
    return parse(parser, argv, QUICK, TINY)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = Report(NAME, arguments, COLUMNS)
    for backend in arguments.backends:
        first: Row = {}
        for number in arguments.num_documents:
            documents = cut(arguments.seq_length, number, arguments.cut)
            row = run(documents, backend, arguments, report)
            first = first or row
            row |= {"documents": number, "cut": arguments.cut, "backend": backend}
            report.add(row | faster(row, first))
    report.finish()
    draw(report, arguments.seq_length)
    return 0


def cut(seq_length: int, number: int, how: str) -> Documents:
    """A sequence of so many documents."""
    if how == "random":
        places = np.random.default_rng(number).choice(np.arange(1, seq_length), number - 1, replace=False)
    else:
        places = np.arange(1, number) * seq_length // number
    return Documents((tuple(pairwise([0, *sorted(places.tolist()), seq_length])),))


def run(documents: Documents, backend: str, arguments: argparse.Namespace, report: Report) -> Row:
    """Measure the time and memory of one block."""
    execution = replace(OFFLOADED.execution(arguments.chunk, Recompute.MLP), documents=True)
    config = geometry_of(arguments).model_config(arguments.seq_length, backend)
    build = partial(ModelBlock, config, execution, report.device, documents)
    traced = report.device.type == "cuda"
    row = measure(build, report.device, report.matmul, arguments.repeats, profiled=traced)
    share = documents.squared_lengths / arguments.seq_length**2
    return row | {"attention_share": share, "attention_seconds": attention_seconds(row) if traced else None}


def attention_seconds(row: Row) -> float | None:
    """Sum the seconds of the attention kernels in a row's trace."""
    if "profile" not in row:
        return None
    return sum(seconds for kind, seconds in row.pop("profile")["seconds"].items() if kind.startswith("attention"))


def faster(row: Row, first: Row) -> Row:
    """Return the speedup over the first row, where both were measured."""
    ratios = {"faster": "seconds", "attention_faster": "attention_seconds"}
    known = {name: key for name, key in ratios.items() if row.get(key) and first.get(key)}
    return {name: first[key] / row[key] for name, key in known.items()}


def draw(report: Report, seq_length: int) -> None:
    """Plot the speedup over the number of documents."""
    with report.picture(1) as (panel,):
        for backend in dict.fromkeys(row["backend"] for row in report.rows):
            rows = [row for row in report.rows if row["backend"] == backend and "faster" in row]
            numbers = [row["documents"] for row in rows]
            panel.plot(numbers, [row["faster"] for row in rows], marker="o", label=f"{backend}, block")
            if all("attention_faster" in row for row in rows):
                panel.plot(
                    numbers, [row["attention_faster"] for row in rows], marker="s", label=f"{backend}, attention"
                )
            panel.plot(numbers, [1 / row["attention_share"] for row in rows], linestyle=":", color="gray")
        panel.set(xscale="log", yscale="log", xlabel=f"documents in {thousands(seq_length)} tokens",
                  ylabel="times as fast as one document")  # fmt: skip
        panel.legend()


if __name__ == "__main__":
    sys.exit(run_script(main))
