#!/usr/bin/env python3
"""Measure GPU and host memory over the sequence length: GPU memory should stay constant.

    python benchmarks/memory_over_length.py                        up to 2M tokens in a narrow block
    python benchmarks/memory_over_length.py --lengths 1048576 --narrow-lengths 65536

Runs one streamed block with offloading, forward and backward. Attention time is quadratic in the length, so the full
width (Llama-3-8B's) runs at --lengths, and a narrow block of 2 query heads and 1 key/value head, hidden size 256, at
--narrow-lengths, with the same code, chunks and number of tiles as a wide one. Nothing is extrapolated: every row is a
whole pass. A pass at the shortest length warms up each chunk size; then every length runs once.

"GPU GiB" is the peak above weights and their gradients, as the docstring of benchmarks/block.py defines it. "host used"
is the peak use of the host pool by tensors, including input and output of the block and their gradients; "host
allocated" is the memory that the pool allocated from the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.block import OFFLOADED, ModelBlock, measure
from benchmarks.common import (
    GIB,
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
    token_axis,
)
from megatron.config import Recompute

NAME = "memory_over_length"
NARROW = Geometry(hidden_size=256, ffn_hidden_size=896, num_attention_heads=2, num_key_value_heads=1)
COLUMNS = (
    Column("width", "block"),
    Column("chunk", "chunk"),
    Column("length", "tokens"),
    Column("above_gib", "GPU GiB", ".3f"),
    Column("peak_gib", "GPU GiB with weights", ".3f"),
    Column("host_used_gib", "host used GiB", ".3f"),
    Column("host_allocated_gib", "host allocated GiB", ".3f"),
    Column("host_bytes_per_token", "host bytes/token", ".0f"),
    Column("seconds", "seconds", ".2f"),
)
QUICK = {"lengths": [65536, 131072], "narrow_lengths": [65536, 262144, 1048576], "chunks": [32768]}
TINY = {**TINY_GEOMETRY, "lengths": [64, 128], "narrow_lengths": [128], "chunks": [32]}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--lengths", type=int, nargs="*", default=[65536, 131072, 262144],
                        help="tokens, at full width [65536 131072 262144]")  # fmt: skip
    parser.add_argument("--narrow-lengths", type=int, nargs="*", default=[65536, 262144, 1048576, 2097152],
                        help="tokens, in the narrow block [65536 262144 1048576 2097152]")  # fmt: skip
    parser.add_argument("--chunks", type=int, nargs="+", default=[32768, 16384], help="[32768 16384]")
    parser.add_argument("--recompute", type=Recompute, choices=[*Recompute], default=Recompute.ALL,
                        help="matmuls to recompute [%(default)s]")  # fmt: skip
    parser.add_argument("--backend", default="auto", help="attention kernel [%(default)s]")
    add_geometry_flags(parser, Geometry())
    return parse(parser, argv, QUICK, TINY)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = Report(NAME, arguments, COLUMNS)
    widths = (("full", geometry_of(arguments), arguments.lengths), ("narrow", NARROW, arguments.narrow_lengths))
    for width, geometry, lengths in widths:
        for chunk in arguments.chunks:
            if lengths:
                run(geometry, min(lengths), chunk, arguments, report)
            for length in sorted(lengths):
                row = {"width": width, "chunk": thousands(chunk), "tokens": length, "length": thousands(length)}
                report.add(row | run(geometry, length, chunk, arguments, report))
    growth = growths(report.rows)
    report.write(growth=growth)
    report.finish()
    for line in growth:
        print(line["text"])
    draw(report)
    return 0


def run(geometry: Geometry, length: int, chunk: int, arguments: argparse.Namespace, report: Report) -> Row:
    """Measure the memory of one pass."""
    execution = OFFLOADED.execution(chunk, arguments.recompute)
    build = partial(ModelBlock, geometry.model_config(length, arguments.backend), execution, report.device)
    row = measure(build, report.device, report.matmul, repeats=1, warm_ups=0)
    if "failed" in row:
        return row
    return row | {"host_bytes_per_token": row["host_used_gib"] * GIB / length}


def growths(rows: Sequence[Row]) -> list[Row]:
    """Return by width and chunk the GPU memory of the longest sequence over that of the shortest, if there are two."""
    results = []
    for (width, chunk), group in series(rows).items():
        known = [row for row in group if row.get("above_gib") is not None]
        if len(known) < 2:
            continue
        first, last = known[0], known[-1]
        ratio = last["above_gib"] / first["above_gib"]
        text = (
            f"{width} block, chunk {chunk}: {last['tokens'] / first['tokens']:.0f} times the tokens "
            f"({first['length']} to {last['length']}) take {ratio:.3f} times the GPU memory"
        )
        results.append({"width": width, "chunk": chunk, "ratio": ratio, "text": text})
    return results


def series(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group the rows that did not fail by width and chunk."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "failed" not in row:
            groups.setdefault((row["width"], row["chunk"]), []).append(row)
    return groups


def draw(report: Report) -> None:
    """Plot GPU and host memory over the length."""
    panels = (("above_gib", "GPU peak above weights and their gradients, GiB"), ("host_used_gib", "host used, GiB"))
    with report.picture(2) as axes:
        for panel, (key, title) in zip(axes, panels, strict=True):
            for (width, chunk), rows in series(report.rows).items():
                _line(panel, [row for row in rows if row.get(key) is not None], key, f"{width} block, chunk {chunk}")
            token_axis(panel, "tokens")
            panel.set_title(title)
            panel.grid(alpha=0.3)
        axes[0].set_ylim(bottom=0)
        axes[1].set_yscale("log", base=2)
        if report.rows:
            axes[1].legend(fontsize=8)


def _line(panel: Any, rows: Sequence[Row], key: str, label: str) -> None:
    panel.plot([row["tokens"] for row in rows], [row[key] for row in rows], marker="o", label=label)


if __name__ == "__main__":
    sys.exit(run_script(main))
