#!/usr/bin/env python3
"""Measure prefill speed of long prompts and decode time per token, with the KV cache on the GPU and on the host.

    python benchmarks/generation.py
    python benchmarks/generation.py --num-layers 4 --lengths 1048576 --ways offloaded

A model of `--num-layers` blocks with random weights prefills a prompt of random ids chunk by chunk, and then decodes
new tokens one by one. "x matmul" is the FLOP rate of the prefill over that of the reference matmul. "ms a token" is the
median over the new tokens, and "GB/s" is the cache size divided by that time: an offloaded cache cannot exceed the
bandwidth of the link. "of a token" is the decode kernel. "above GiB" is the GPU's peak minus the weights. The first
prompt of each way is prefilled twice, to warm up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import (
    TINY_GEOMETRY,
    Column,
    Geometry,
    Report,
    Row,
    add_geometry_flags,
    allocated_bytes,
    attempt,
    build_parser,
    compute_dtype,
    geometry_of,
    gib,
    parse,
    peak_bytes,
    reset_peak,
    run_script,
    thousands,
    token_axis,
    wall_seconds,
)
from megatron.config import ModelConfig
from megatron.core.parallel_state import ParallelState
from megatron.generation.cached_model import CachedModel
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.planner.flops import forward_flops

NAME = "generation"
VOCABULARY = 32000
WAYS = ("offloaded", "on-device")
COLUMNS = (
    Column("way", "cache", width=9),
    Column("length", "prompt"),
    Column("backend", "backend", width=12),
    Column("prompt_seconds", "prompt s", ".2f"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("times_matmul", "x matmul", ".3f"),
    Column("token_backend", "of a token", width=12),
    Column("token_milliseconds", "ms a token", ".1f"),
    Column("gigabytes_per_second", "GB/s", ".1f"),
    Column("cache_gib", "cache GiB", ".2f"),
    Column("weights_gib", "weights GiB", ".2f"),
    Column("above_gib", "above GiB", ".2f"),
)
QUICK = {"lengths": [65536], "num_layers": 4}
TINY = {**TINY_GEOMETRY, "lengths": [100, 200], "chunk": 48, "num_layers": 2, "new_tokens": 2}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--num-layers", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 131072, 262144, 524288],
                        help="tokens of the prompt [65536 131072 262144 524288]")  # fmt: skip
    parser.add_argument("--chunk", type=int, default=32768, help="tokens per chunk [%(default)s]")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="where the cache is [all]")
    parser.add_argument("--new-tokens", type=int, default=8, help="timed after each prompt [%(default)s]")
    add_geometry_flags(parser, Geometry())
    return parse(parser, argv, QUICK, TINY)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = Report(NAME, arguments, COLUMNS)
    for way in arguments.ways:
        for length in arguments.lengths:
            is_first = length == arguments.lengths[0]
            row = attempt(partial(measure, arguments, way, length, is_first, report), report.device)
            report.add({"way": way, "tokens": length, "length": thousands(length)} | row)
    report.finish()
    draw(report)
    return 0


def measure(arguments: argparse.Namespace, way: str, length: int, is_first: bool, report: Report) -> Row:
    """Measure time and memory of one prompt and the tokens after it."""
    device = report.device
    longest = 2 * (length + arguments.new_tokens)
    config = geometry_of(arguments).model_config(longest, num_layers=arguments.num_layers)
    model = build(config, arguments.chunk, way == "offloaded", device)
    weights = allocated_bytes(device)
    prompt = torch.randint(0, VOCABULARY, (length,)).tolist()
    if is_first:
        model.prefill(prompt)
    reset_peak(device)
    cache, logits_V = None, torch.empty(0)

    def read() -> None:
        nonlocal cache, logits_V
        cache, logits_V = model.prefill(prompt)

    def add_token() -> None:
        nonlocal logits_V
        assert cache is not None
        token_11 = logits_V.argmax().reshape(1, 1).cpu()
        logits_V = model.logits(model.extend([cache], token_11))[0, 0]

    prompt_seconds = wall_seconds(read, device)
    add_token()
    token_seconds = statistics.median(wall_seconds(add_token, device) for _ in range(arguments.new_tokens))
    assert cache is not None
    peak = peak_bytes(device)
    flops = forward_flops(replace(config, seq_length=length), 0, length).total
    return {
        "backend": model.stream.attention.name,
        "prompt_seconds": prompt_seconds,
        "tokens_per_second": length / prompt_seconds,
        "times_matmul": flops / prompt_seconds / 1e12 / report.matmul,
        "token_backend": model.short_attention.name,
        "token_milliseconds": 1e3 * token_seconds,
        "gigabytes_per_second": cache.num_bytes / token_seconds / 1e9,
        "cache_gib": gib(cache.num_bytes),
        "weights_gib": gib(weights),
        "above_gib": gib(None if peak is None else peak - weights),
    }


def build(config: ModelConfig, chunk: int, offloading: bool, device: torch.device) -> CachedModel:
    """Build a model with random weights."""
    initialization = Initialization(compute_dtype(device), device)
    execution = Execution(fpdt=True, chunk_size=chunk, offloading=offloading)
    model = build_model(config, VOCABULARY, ParallelState(), execution, initialization).eval()
    return CachedModel(model, VOCABULARY)


def draw(report: Report) -> None:
    """Plot prefill tokens per second and decode time per token over the prompt's length."""
    with report.picture(2) as panels:
        for panel, key, label in zip(
            panels, ("tokens_per_second", "token_milliseconds"),
            ("prompt, tokens per second", "a new token, milliseconds"), strict=True,
        ):  # fmt: skip
            for way in dict.fromkeys(row["way"] for row in report.rows):
                rows = [row for row in report.rows if row["way"] == way and key in row]
                panel.plot([row["tokens"] for row in rows], [row[key] for row in rows], marker="o", label=way)
            token_axis(panel, "tokens of the prompt")
            panel.set_yscale("log")
            panel.set_ylabel(label)
            panel.legend()


if __name__ == "__main__":
    sys.exit(run_script(main))
