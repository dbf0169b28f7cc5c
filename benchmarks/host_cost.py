#!/usr/bin/env python3
"""Measure what the host does to run a block: its launches and its time, plain and streamed.

    python benchmarks/host_cost.py                  on a GPU
    python benchmarks/host_cost.py --device cpu     the same counts, with the kernels themselves in the time

A block of a tiny model takes the GPU almost no time, so its time is that of the host, and so it is for small models on
short sequences. The sequence has 1, 2, .. chunks of the same length; "plain" runs it in one piece. "launches" are
kernels and copies, on a CPU the operators that compute or copy; "us" is the CPU time of the thread that queues them,
the lowest over repeats. Both are per block. "us/tile" is the time of both passes over the number of tiles.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.block import OFFLOADED, ON_DEVICE, ModelBlock
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
    synchronize,
)
from megatron.model.builder import Execution
from megatron.monitoring.kernel_times import kernels_of

NAME = "host_cost"
WAYS = ("plain", "on-device", "offloaded")
PASSES = ("forward", "backward")
WARM_UPS = 2
COLUMNS = (
    Column("way", "way", width=10),
    Column("chunks", "chunks", "d"),
    Column("tiles", "tiles", "d"),
    *(Column(f"{name}_launches", f"launches {name}", ".0f") for name in PASSES),
    *(Column(f"{name}_us", f"us {name}", ".0f") for name in PASSES),
    Column("us_per_tile", "us/tile", ".0f"),
)
QUICK = {"chunks": [4], "repeats": 5}
TINY = {"chunks": [1, 2], "repeats": 2}
NO_LAUNCH = frozenset(("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy; views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launches = not function.is_view and function.overloadpacket.__name__ not in NO_LAUNCH
        result = function(*args, **(kwargs or {}))
        self.number += launches and isinstance(result, (torch.Tensor, tuple, list))
        return result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="[all]")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8], help="in the sequence [1 2 4 8]")
    parser.add_argument("--chunk", type=int, default=32, help="tokens per chunk [%(default)s]")
    parser.add_argument("--num-layers", type=int, default=4, help="stacked blocks [%(default)s]")
    parser.add_argument("--repeats", type=int, default=20, help="[%(default)s]")
    add_geometry_flags(parser, Geometry(**TINY_GEOMETRY))
    return parse(parser, argv, QUICK, TINY)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = Report(NAME, arguments, COLUMNS)
    for num_chunks in arguments.chunks:
        for way in arguments.ways:
            report.add(measure(way, num_chunks, arguments, report.device))
    report.finish()
    draw(report)
    return 0


def measure(way: str, num_chunks: int, arguments: argparse.Namespace, device: torch.device) -> Row:
    """Return the launches and microseconds per block."""
    config = geometry_of(arguments).model_config(num_chunks * arguments.chunk, num_layers=arguments.num_layers)
    executions = {"plain": Execution(), **{w.name: w.execution(arguments.chunk) for w in (ON_DEVICE, OFFLOADED)}}
    block = ModelBlock(config, executions[way], device)
    num_tiles = 1 if way == "plain" else num_chunks * (num_chunks + 1) // 2
    seconds: dict[str, list[float]] = {name: [] for name in PASSES}
    for _ in range(WARM_UPS + arguments.repeats):
        block.prepare()
        for name, run in zip(PASSES, (block.forward, block.backward), strict=True):
            synchronize(device)
            started = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - started)
    block.prepare()
    n = arguments.num_layers
    launches = {
        f"{name}_launches": num_launches(run, device) / n
        for name, run in zip(PASSES, (block.forward, block.backward), strict=True)
    }
    us = {name: 1e6 * min(seconds[name][WARM_UPS:]) / n for name in PASSES}
    row = {"way": way, "chunks": num_chunks, "tiles": num_tiles, **launches}
    return row | {f"{name}_us": us[name] for name in PASSES} | {"us_per_tile": sum(us.values()) / num_tiles}


def num_launches(run: Callable[[], None], device: torch.device) -> int:
    """Count the launches of a run."""
    if device.type != "cuda":
        with Launches() as launches:
            run()
        return launches.number
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize(device)
    return len(kernels_of(profile))


def draw(report: Report) -> None:
    """Plot time and launches over the number of chunks, one line per way."""
    panels = (("_us", "microseconds of the host per block"), ("_launches", "launches per block"))
    with report.picture(2) as axes:
        for panel, (key, title) in zip(axes, panels, strict=True):
            for way in dict.fromkeys(row["way"] for row in report.rows):
                rows = [row for row in report.rows if row["way"] == way]
                totals = [sum(row[name + key] for name in PASSES) for row in rows]
                panel.plot([row["chunks"] for row in rows], totals, marker="o", linestyle="-", label=way)
            panel.set(title=title, xlabel="chunks", ylim=(0, None))
            panel.legend()


if __name__ == "__main__":
    sys.exit(run_script(main))
