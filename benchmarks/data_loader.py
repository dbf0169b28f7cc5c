#!/usr/bin/env python3
"""Measure the tokens per second that the data loader gives a rank, and the memory that it uses.

    python benchmarks/data_loader.py
    python benchmarks/data_loader.py --lengths 2097152 --sequence-parallel-size 8

Writes datasets of random tokens in documents of very different lengths, and loads micro-batches of one sample as in
training: the rank's slices through the memory map, the check against the vocabulary, and the prefetch thread. "sources"
is the number of blended datasets. The files just written are in the page cache, so this is the rate of the program and
not of a disk. The goal is a million tokens per second and rank; a step uses far fewer. All tokens of a sequence count
for each of the ranks that share it.

"batch" is the size of a micro-batch, "peak" the peak memory while it is made, batch included, and "x batch" the ratio
of peak to batch. Memory-mapped files do not count. With --documents, ends of documents restart the positions, bound
attention and do not count in the loss, so every rank scans the whole sequence. With --device cuda the batches are
pinned.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import Column, Report, Row, build_parser, parse, run_script, spread, thousands, token_axis
from megatron.core.sequence_layout import SequenceLayout
from megatron.data.batch import Batch, EndOfDocument, slice_batch
from megatron.data.gpt_dataset import SampleSettings, build_datasets
from megatron.data.indexed_dataset import IndexedDatasetWriter, smallest_dtype
from megatron.data.prefetch import Prefetcher

NAME = "data_loader"
GOAL = 1e6  # tokens per second and rank
MIB = 2**20
MEAN_DOCUMENT = 4096
END_OF_DOCUMENT = 0
COLUMNS = (
    Column("length", "tokens"),
    Column("sources", "sources"),
    Column("microbatches", "micro-batches"),
    Column("tokens_per_second", "tokens/s/rank", ".3g"),
    Column("times_goal", "x goal", ".0f"),
    Column("spread", "spread", ".1%"),
    Column("batch_mib", "batch MiB", ".2f"),
    Column("peak_mib", "peak MiB", ".2f"),
    Column("times_batch", "x batch", ".2f"),
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.set_defaults(device="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 131072, 2097152],
                        help="tokens of a sample [8192 131072 2097152]")  # fmt: skip
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 4], help="number of blended datasets [1 4]")
    parser.add_argument("--tokens", type=int, default=2**25, help="of all datasets together, and of a repeat [32M]")
    parser.add_argument("--repeats", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=128256, help="[%(default)s]")
    parser.add_argument("--sequence-parallel-size", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk [the whole sample]")
    parser.add_argument("--documents", action="store_true", help="documents of a sample do not see each other")
    parser.add_argument("--prefetch-microbatches", type=int, default=2, help="[%(default)s]")
    quick = {"tokens": 2**23, "repeats": 2}
    on_cpu = quick if "--quick" in (sys.argv if argv is None else argv) else {}  # a CPU is what is measured here
    arguments = parse(parser, argv, quick, tiny=on_cpu)
    if arguments.tokens < 2 * max(arguments.lengths):
        parser.error(f"--tokens ({arguments.tokens}) must be at least twice the longest of --lengths; raise it")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report = Report(NAME, arguments, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        for sources in arguments.sources:
            paths = write_datasets(Path(folder), sources, arguments.tokens, arguments.vocab_size)
            for length in arguments.lengths:
                row = {"length": thousands(length), "tokens": length, "sources": sources}
                report.add(row | measure(paths, length, arguments))
    report.finish()
    draw(report)
    return 0


def write_datasets(folder: Path, sources: int, num_tokens: int, vocab_size: int) -> list[str]:
    """Write `sources` datasets, `num_tokens` random tokens in all; return weights and prefixes (no weight for one)."""
    random = np.random.default_rng(sources)
    paths = []
    for source in range(sources):
        prefix = folder / f"{sources}-{source}"
        left = num_tokens // sources
        with IndexedDatasetWriter(prefix, smallest_dtype(vocab_size)) as writer:
            while left:
                size = min(left, 1 + int(random.lognormal(np.log(MEAN_DOCUMENT) - 2, 2)))  # of mean MEAN_DOCUMENT
                writer.add_document(np.append(random.integers(1, vocab_size, size=size - 1), END_OF_DOCUMENT))
                left -= size
        paths += [str(source + 1), str(prefix)]
    return paths if sources > 1 else paths[1:]


def measure(paths: Sequence[str], length: int, arguments: argparse.Namespace) -> Row:
    """Measure one row: the rate of the whole loader, and the memory of one micro-batch."""
    per_repeat = arguments.tokens // length
    settings = SampleSettings(length, seed=1, vocab_size=arguments.vocab_size)
    data, _, _ = build_datasets(paths, "1", (per_repeat, 0, 0), settings)
    assert data is not None
    layout = SequenceLayout(length, min(arguments.chunk_size or length, length), arguments.sequence_parallel_size)
    end_of_document = EndOfDocument(END_OF_DOCUMENT, *[arguments.documents] * 3)

    def make(index: int) -> Batch:
        return slice_batch([end_of_document.sample(data[index])], layout, 0, pin=arguments.device == "cuda")

    def take_all() -> float:
        started = time.perf_counter()
        with Prefetcher(map(make, range(per_repeat)), arguments.prefetch_microbatches) as batches:
            for _ in batches:
                pass
        return time.perf_counter() - started

    seconds = [take_all() for _ in range(arguments.repeats + 1)][1:]  # the first one warms up
    rate = per_repeat * length / statistics.median(seconds)
    return {
        "microbatches": per_repeat,
        "tokens_per_second": rate,
        "times_goal": rate / GOAL,
        "spread": spread(seconds),
        **memory(make),
    }


def memory(make: Callable[[int], Batch]) -> Row:
    """Measure the size of one micro-batch, and the peak memory while it is made."""
    batch = make(0)
    held = sum(part.nbytes for part in (batch.tokens, batch.labels, batch.loss_mask, batch.positions))
    peak = peak_bytes(lambda: make(0))
    return {"batch_mib": held / MIB, "peak_mib": peak / MIB, "times_batch": peak / held}


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the peak bytes of numpy arrays plus the peak of torch tensors on the host while `work` runs."""
    tracemalloc.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        work()
        _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most - before + max(accumulate(_allocations(profiler), initial=0))


def _allocations(profiler: torch.profiler.profile) -> Iterator[int]:
    """Yield the bytes that torch allocated, or freed (negative), in order of time."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            yield event.nbytes()


def draw(report: Report) -> None:
    """Plot tokens per second over the length, with the goal."""
    with report.picture(1) as (panel,):
        for sources in sorted({row["sources"] for row in report.rows}):
            rows = [row for row in report.rows if row["sources"] == sources]
            label = f"{sources} datasets" if sources > 1 else "one dataset"
            panel.plot([row["tokens"] for row in rows], [row["tokens_per_second"] for row in rows], "o-", label=label)
        panel.axhline(GOAL, color="black", linestyle=":", label="goal")
        token_axis(panel, "tokens of a sample")
        panel.set_yscale("log")
        panel.set_title("tokens/s/rank")
        panel.legend()


if __name__ == "__main__":
    sys.exit(run_script(main))
