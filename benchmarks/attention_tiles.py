#!/usr/bin/env python3
"""Measure the speed of each attention kernel on one tile.

    python benchmarks/attention_tiles.py

Times forward and backward of every available backend of megatron.ops.attention on square tiles of random bf16 tensors,
causal and full, by the GPU's own clock. The FLOPs of a full tile of S tokens are 4 S^2 heads head_size forward and 2.5
times that backward (five matmuls, one of which recomputes the scores); a causal tile counts half. "model" is the rate
of the pair in training, where output and log-sum-exp are saved for backward: 3 times the forward FLOPs over both times.

The reference backend, which serves as ground truth, runs only if --backends names it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import (
    Column,
    Report,
    Row,
    attempt,
    build_parser,
    compute_dtype,
    kernel_seconds,
    parse,
    run_script,
    spread,
    thousands,
    token_axis,
)
from megatron.core.documents import Mask
from megatron.ops.attention import BACKENDS, QKV, AttentionBackend, AttentionRequest, AttentionVariant, KernelVariant

NAME = "attention_tiles"
BACKWARD_PRODUCTS = 2.5
COLUMNS = (
    Column("backend", "backend", width=12),
    Column("tile", "tile"),
    Column("mask", "mask"),
    Column("forward_tflops", "forward TFLOP/s", ".0f"),
    Column("backward_tflops", "backward TFLOP/s", ".0f"),
    Column("model_tflops", "model TFLOP/s", ".0f"),
    Column("forward_times_matmul", "forward x matmul", ".3f"),
    Column("backward_times_matmul", "backward x matmul", ".3f"),
    Column("times_matmul", "model x matmul", ".3f"),
    Column("spread", "spread", ".1%"),
)
QUICK = {"tiles": [8192, 32768], "repeats": 3}
TINY = {"tiles": [64, 128], "heads": 4, "key_value_heads": 2, "head_size": 16, "repeats": 2}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--tiles", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="tokens per tile")
    parser.add_argument("--backends", nargs="+", choices=[backend.name for backend in BACKENDS],
                        help="[all available, except the reference]")  # fmt: skip
    parser.add_argument("--heads", type=int, default=32, help="query heads [%(default)s]")
    parser.add_argument("--key-value-heads", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--head-size", type=int, default=128, help="[%(default)s]")
    parser.add_argument("--repeats", type=int, default=5, help="[%(default)s]")
    return parse(parser, argv, QUICK, TINY)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = Report(NAME, arguments, COLUMNS)
    for backend in serving_backends(arguments, report.device):
        for tile in arguments.tiles:
            for causal in (True, False):
                row = {"backend": backend.name, "tile": thousands(tile), "tokens": tile,
                       "mask": "causal" if causal else "full"}  # fmt: skip
                report.add(row | measure_or_say_why(backend, tile, causal, arguments, report))
    report.finish()
    draw(report)
    return 0


def serving_backends(arguments: argparse.Namespace, device: torch.device) -> list[AttentionBackend]:
    """Return the available backends that the flags ask for; print why the others are not available."""
    serving = []
    size = arguments.head_size
    request = AttentionRequest(device, compute_dtype(device), size, (AttentionVariant(size**-0.5),))
    for backend in BACKENDS:
        if backend.name not in (arguments.backends or [backend.name]):
            continue
        if arguments.backends is None and backend.name == "reference":
            continue
        refusal = backend.refusal(request)
        if refusal:
            print(f"{backend.name:<12}  not measured: {refusal}")
        else:
            serving.append(backend)
    return serving


def measure_or_say_why(
    backend: AttentionBackend, tile: int, causal: bool, arguments: argparse.Namespace, report: Report
) -> Row:
    """Measure a kernel; if it fails, return a row with the error, so that the others are still measured."""
    try:
        return attempt(lambda: measure(backend, tile, causal, arguments, report), report.device)
    except Exception as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return {"failed": f"{type(error).__name__}: {first_line[:100]}"}


def measure(backend: AttentionBackend, tile: int, causal: bool, arguments: argparse.Namespace, report: Report) -> Row:
    """Measure one backend on one kind of tile."""
    device, head_size = report.device, arguments.head_size

    def random(heads: int) -> Tensor:
        return torch.randn(tile, 1, heads, head_size, device=device, dtype=compute_dtype(device))

    q, do = random(arguments.heads), random(arguments.heads)
    qkv = QKV(q, random(arguments.key_value_heads), random(arguments.key_value_heads))
    variant = KernelVariant(head_size**-0.5, Mask.CAUSAL if causal else Mask.FULL)
    output = backend.forward(qkv, variant)
    forward = kernel_seconds(lambda: backend.forward(qkv, variant), device, arguments.repeats)
    backward = kernel_seconds(lambda: backend.backward(do, qkv, output, variant), device, arguments.repeats)
    flops = forward_flops(tile, arguments.heads, head_size, causal)
    return rates(flops, forward, backward, report.matmul)


def forward_flops(tile: int, heads: int, head_size: int, causal: bool) -> int:
    """Count the FLOPs of both matmuls of one tile's forward pass."""
    return 4 * tile**2 * heads * head_size // (2 if causal else 1)


def rates(flops: int, forward: Sequence[float], backward: Sequence[float], matmul: float) -> Row:
    """Compute rates and ratios from the forward FLOPs and the seconds of each repeat."""
    f, b = statistics.median(forward), statistics.median(backward)
    tflops = {
        "forward": flops / f / 1e12,
        "backward": BACKWARD_PRODUCTS * flops / b / 1e12,
        "model": 3 * flops / (f + b) / 1e12,
    }
    return {
        **{f"{name}_tflops": rate for name, rate in tflops.items()},
        "forward_times_matmul": tflops["forward"] / matmul,
        "backward_times_matmul": tflops["backward"] / matmul,
        "times_matmul": tflops["model"] / matmul,
        "forward_seconds": f,
        "backward_seconds": b,
        "spread": max(spread(forward), spread(backward)),
    }


def draw(report: Report) -> None:
    """Plot rates over the tile's length, a line per backend; full tiles dashed."""
    measured = [row for row in report.rows if "failed" not in row]
    names = list(dict.fromkeys(row["backend"] for row in measured))
    with report.picture(2) as axes:
        for panel, phase in zip(axes, ("forward", "backward"), strict=True):
            for number, name in enumerate(names):
                for mask, style in (("causal", "-"), ("full", "--")):
                    rows = [row for row in measured if (row["backend"], row["mask"]) == (name, mask)]
                    _line(panel, rows, f"{phase}_times_matmul", style, f"C{number}", f"{name}, {mask}")
            panel.set(title=phase, ylabel="x matmul", ylim=(0, None))
            token_axis(panel, "tokens per tile")
            panel.grid(alpha=0.3)
        if names:
            axes[0].legend(fontsize=8)


def _line(panel: Any, rows: Sequence[Row], key: str, style: str, color: str, label: str) -> None:
    panel.plot([r["tokens"] for r in rows], [r[key] for r in rows], style, color=color, marker="o", label=label)


if __name__ == "__main__":
    sys.exit(run_script(main))
