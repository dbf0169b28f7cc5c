#!/usr/bin/env python3
"""Compare speed and GPU memory of a streamed block with other ways to run it.

    python benchmarks/streamed_block.py                     whole blocks: ceiling, offloaded, on-device, recomputed
    python benchmarks/streamed_block.py --disk /nvme0,/nvme1    beside them: disk, whose rate is measured first
    python benchmarks/streamed_block.py --attention-only    attention layers: ceiling, offloaded, deepspeed

Runs one block, Llama-3-8B's by default, forward and backward, every way in one process on one GPU. --blocks runs
several in a row, so that the copies at the ends of a block overlap with the compute of its neighbors. --profile runs
each way once more and prints a breakdown of its time. --deterministic-mode off on compares each way without the mode
of that name and with it. The docstring of benchmarks/block.py defines the ways and the
FLOPs that count. "x ceiling" is the ratio to the ceiling of the same tokens and kernel. "peak" is all live GPU memory;
"above" is the peak above weights and their gradients, as defined there too.

--attention-only compares with DeepSpeed's FPDT attention layer, which has no MLP: multi-head attention, 256K tokens,
and on our side a block with an MLP of width 128 (the smallest possible). Each side counts its own FLOPs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.block import (
    DISK,
    OFFLOADED,
    ON_DEVICE,
    RECOMPUTED,
    Ceiling,
    Contestant,
    ModelBlock,
    automatic_recompute,
    measure,
    on_disk,
)
from benchmarks.common import (
    GIB,
    SPEED_COLUMNS,
    TINY_GEOMETRY,
    Column,
    Geometry,
    Report,
    Row,
    add_geometry_flags,
    build_parser,
    compute_dtype,
    geometry_of,
    parse,
    run_script,
    thousands,
)
from benchmarks.deepspeed_layer import DeepSpeedAttention, kernel_name
from megatron.config import Recompute
from megatron.core.disk_rates import DiskRates
from megatron.fpdt.disk_files import STRIPE_BYTES, DiskFiles, check_folder
from megatron.launch.determinism import use_deterministic_kernels
from megatron.launch.disk import measure_disk
from megatron.model.builder import Execution
from megatron.model.layers import attention_request
from megatron.ops.attention import choose_backend

NAME = "streamed_block"
WAYS = {way.name: way for way in (OFFLOADED, DISK, ON_DEVICE, RECOMPUTED)}
BLOCKS = ["ceiling", "offloaded", "disk", "on-device", "recomputed"]
ATTENTION_LAYERS = ["ceiling", "offloaded", "deepspeed"]
COLUMNS = (
    Column("way", "way", width=10),
    Column("length", "tokens"),
    Column("chunk", "chunk"),
    Column("recompute", "recompute"),
    Column("backend", "backend", width=12),
    Column("deterministic", "deterministic"),
    *SPEED_COLUMNS[:-1],
    Column("times_ceiling", "x ceiling", ".3f"),
    SPEED_COLUMNS[-1],
    Column("peak_gib", "peak GiB", ".2f"),
    Column("above_gib", "above GiB", ".2f"),
)
QUICK = {"lengths": [65536], "repeats": 2}
TINY = {**TINY_GEOMETRY, "lengths": [96], "chunks": [32], "deepspeed_chunk": 96, "disk_probe": 0.03, "repeats": 2}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--attention-only", action="store_true", help="compare with DeepSpeed's FPDT attention layer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 262144], help="tokens [65536 262144]")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32768], help="tokens per chunk [32768]")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="attention kernels [auto]")
    parser.add_argument("--ways", nargs="+", choices=[*BLOCKS, "deepspeed"], help="ways of running [all that apply]")
    parser.add_argument("--deepspeed-chunk", type=int, default=65536, help="DeepSpeed's chunk [%(default)s]")
    parser.add_argument("--recompute", choices=["auto", *Recompute], nargs="+", default=["auto"],
                        help="matmuls that the streamed ways recompute; auto: as a training run with offloading "
                        "would choose [auto]")  # fmt: skip
    parser.add_argument("--checkpoint-interval", type=int, default=1, metavar="K",
                        help="save the input of every Kth block of the streamed ways [%(default)s]")  # fmt: skip
    parser.add_argument("--blocks", type=int, default=1,
                        help="stacked blocks, as in a model; times are per block [%(default)s]")  # fmt: skip
    parser.add_argument("--disk", metavar="DIR[,DIR...]", help="folders on local disks for the way of that name")
    parser.add_argument("--disk-share", type=float, default=1.0, metavar="X",
                        help="of what is copied once, on disk; the rest is on the host [%(default)s]")  # fmt: skip
    parser.add_argument("--disk-probe", type=float, default=16.0, metavar="GiB",
                        help="to write and to read first, 20 s at most each, for its rate [%(default)s]")  # fmt: skip
    parser.add_argument("--deterministic-mode", nargs="+", choices=("off", "on"), default=["off"],
                        help="without deterministic kernels, with them, or both [off]")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--profile", action="store_true", help="trace one more run of each way")
    add_geometry_flags(parser, Geometry())
    quick = QUICK
    if "--attention-only" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(num_key_value_heads=Geometry.num_attention_heads, ffn_hidden_size=128, lengths=[262144])
        quick = QUICK | {"lengths": [131072]}
    arguments = parse(parser, argv, quick, TINY)
    if arguments.profile and arguments.device == "cpu":
        parser.error("--profile traces a GPU; leave it out with --device cpu")
    possible = ATTENTION_LAYERS if arguments.attention_only else BLOCKS
    possible = [way for way in possible if way != "disk" or arguments.disk]
    arguments.ways = arguments.ways or possible
    unknown = [way for way in arguments.ways if way not in possible]
    if unknown:
        mode = "with --attention-only" if arguments.attention_only else "without --attention-only"
        mode = "without --disk" if unknown[0] == "disk" and not arguments.disk else mode
        parser.error(f"--ways {unknown[0]} is not there {mode}; use {', '.join(possible)}")
    if not 0 < arguments.disk_share <= 1:
        parser.error(f"--disk-share ({arguments.disk_share:g}) must be above 0 and at most 1")
    if "deepspeed" in arguments.ways and "on" in arguments.deterministic_mode:
        parser.error("--deterministic-mode on is not there for --ways deepspeed; leave one of them out")
    for length in arguments.lengths if "deepspeed" in arguments.ways else ():
        if length % arguments.deepspeed_chunk:
            parser.error(f"--deepspeed-chunk ({arguments.deepspeed_chunk}) must divide --lengths ({length})")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if "on" in arguments.deterministic_mode:
        use_deterministic_kernels(arguments.device)
    disk = rates_of_disk(arguments) if "disk" in arguments.ways else None
    report = Report(NAME, arguments, COLUMNS)
    if disk is not None:
        report.write(disk_read_gbps=disk.read, disk_write_gbps=disk.write)
    ceilings: dict[tuple[int, str, str], float] = {}
    for row, build in cases(arguments, report.device):
        row |= measure(build, report.device, report.matmul, arguments.repeats, profiled=arguments.profile)
        key = row["tokens"], row["backend"], row["deterministic"]
        if row["way"] == "ceiling" and "failed" not in row:
            ceilings[key] = row["model_tflops"]
        if key in ceilings and "failed" not in row:
            row["times_ceiling"] = row["model_tflops"] / ceilings[key]
        report.add(row)
    report.finish()
    for line in (*against_deepspeed(report.rows), *against_host(report.rows)):
        print(line)
    for row in report.rows:
        for line in profile_lines(row):
            print(line)
    draw(report)
    return 0


def rates_of_disk(arguments: argparse.Namespace) -> DiskRates:
    """Write and read --disk-probe GiB as the disk tier does, and print the rates."""
    folders, num_stripes = arguments.disk.split(","), max(int(arguments.disk_probe * GIB) // STRIPE_BYTES, 1)
    for folder in folders:
        check_folder(folder)
    files = DiskFiles(folders, num_stripes * STRIPE_BYTES)
    for line in files.warnings:
        print(line)
    rates = measure_disk(files, lambda: None, num_stripes, seconds=20)
    print(f"{arguments.disk}: {rates}", flush=True)
    return rates


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[Row, Callable[[], Contestant]]]:
    """Yield (row keys, builder of the contestant), the ceiling of a length, mode and kernel before the rest.

    Sets torch's mode for the contestant, which has to be built and measured before the next one is asked for.
    """
    geometry = geometry_of(arguments)
    for length, mode in itertools.product(arguments.lengths, arguments.deterministic_mode):
        torch.use_deterministic_algorithms(mode == "on")
        names = {"tokens": length, "length": thousands(length), "deterministic": mode}
        for backend in arguments.backends:
            request = attention_request(geometry.model_config(length), device, compute_dtype(device))
            kernel = choose_backend(backend, request).name
            for way in sorted(set(arguments.ways) - {"deepspeed"}, key=BLOCKS.index):
                row = {"way": way, **names, "backend": kernel}
                if way == "ceiling":
                    yield row | {"chunk": "-", "recompute": "-"}, partial(Ceiling, geometry, length, kernel, device)
                    continue
                for names_of_execution, execution in executions(way, length, arguments, device):
                    config = geometry.model_config(length, kernel, arguments.blocks)
                    build = partial(ModelBlock, config, execution, device)
                    yield row | names_of_execution, build
        if "deepspeed" in arguments.ways:
            chunk = arguments.deepspeed_chunk
            row = {"way": "deepspeed", **names, "chunk": thousands(chunk), "recompute": "all"}
            yield row | {"backend": kernel_name(device)}, partial(DeepSpeedAttention, geometry, length, chunk, device)


def executions(
    way: str, length: int, arguments: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Row, Execution]]:
    """Yield (row keys, execution of the block)."""
    if not WAYS[way].streamed:
        yield {"chunk": "-", "recompute": "all"}, WAYS[way].execution(length)
        return
    model = geometry_of(arguments).model_config(length, num_layers=arguments.blocks)
    for chunk in arguments.chunks:
        automatic = automatic_recompute(model, chunk, device)
        for recompute in dict.fromkeys(
            automatic if name == "auto" else Recompute(name) for name in arguments.recompute
        ):
            execution = WAYS[way].execution(chunk, recompute)
            execution = replace(execution, checkpoint_interval=arguments.checkpoint_interval)
            if way == "disk":
                execution = on_disk(execution, model, device, tuple(arguments.disk.split(",")), arguments.disk_share)
            yield {"chunk": thousands(chunk), "recompute": recompute}, execution


def against_deepspeed(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per streamed row that compares it with DeepSpeed's of the same length."""
    measured = [row for row in rows if "failed" not in row]
    theirs = {row["tokens"]: row for row in measured if row["way"] == "deepspeed"}
    for row in measured:
        if row["way"] not in ("offloaded", "on-device") or row["tokens"] not in theirs:
            continue
        other = theirs[row["tokens"]]
        text = f"{row['model_tflops'] / other['model_tflops']:.2f} times DeepSpeed's model FLOP/s"
        if row["above_gib"] is not None:
            text += f" in {row['above_gib'] / other['above_gib']:.2f} times its GPU memory above weights and gradients"
        yield f"{row['way']}, {row['length']} tokens, chunk {row['chunk']}, {row['backend']}: {text}"


def against_host(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per row with a disk: its traffic, and its time beside that of the same block without one."""

    def key(row: Row) -> tuple[Row, ...]:
        return tuple(row[name] for name in ("tokens", "deterministic", "backend", "chunk", "recompute"))

    measured = [row for row in rows if "failed" not in row]
    offloaded = {key(row): row["seconds"] for row in measured if row["way"] == "offloaded"}
    for row in (row for row in measured if row["way"] == "disk"):
        text = f"{row['disk_written_gib']:.2f} GiB written and {row['disk_read_gib']:.2f} read per block, "
        text += f"{row['disk_stalled_seconds']:.3f} s without work for the GPU"
        if key(row) in offloaded:
            text += f"; {row['seconds'] / offloaded[key(row)]:.3f} times the time of offloaded"
        yield f"disk, {row['length']} tokens, chunk {row['chunk']}, {row['backend']}: {text}"


def profile_lines(row: Row) -> Iterator[str]:
    """Yield the profile of a row: seconds by kind, and the kernels that took the longest."""
    if "profile" not in row:
        return
    yield f"\n{row['way']}, {row['length']} tokens, chunk {row['chunk']}, {row['backend']}: seconds of one traced run"
    for kind, seconds in sorted(row["profile"]["seconds"].items(), key=lambda item: -item[1]):
        yield f"  {seconds:8.3f}        {kind}"
    for seconds, runs, name in row["profile"]["kernels"]:
        yield f"  {seconds:8.3f} {runs:6} {name[:110]}"


def draw(report: Report) -> None:
    """Plot speed and memory, a bar per row."""
    names = [f"{r['way']}, {r['length']}" + (f" by {r['chunk']}" if r["chunk"] != "-" else "") for r in report.rows]
    modes = ["" if r["deterministic"] == "off" else ", deterministic" for r in report.rows]
    labels = [
        f"{name}\n{row['backend']}{mode}, recompute {row['recompute']}"
        for name, mode, row in zip(names, modes, report.rows, strict=True)
    ]
    panels = (("times_matmul", "model FLOP/s, x matmul"), ("above_gib", "peak above weights and their gradients, GiB"))
    with report.picture(2) as axes:
        for panel, (key, title) in zip(axes, panels, strict=True):
            values = [row.get(key) for row in report.rows]
            bars = panel.barh(range(len(values)), [value or 0 for value in values])
            texts = [row.get("failed", "n/a") if row.get(key) is None else f"{row[key]:.2f}" for row in report.rows]
            panel.bar_label(bars, texts, padding=3, fontsize=8)
            panel.set_yticks(range(len(values)), labels, fontsize=7)
            panel.invert_yaxis()
            panel.set_title(title, fontsize=10)
            panel.margins(x=0.15)


if __name__ == "__main__":
    sys.exit(run_script(main))
