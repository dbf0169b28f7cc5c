#!/usr/bin/env python3
"""Compare whole training steps with DeepSpeed's ALST: speed, memory, and the longest sequence that fits.

    python benchmarks/peers.py --num-gpus 4
    python benchmarks/peers.py --num-gpus 4 --cases alst fpdt --seq-lengths 131072 --find-longest

All cases train the same LLaMA from the same initial weights on the same tokens, with the same attention kernel, number
format, optimizer and ZeRO stage. All GPUs share each sequence. Each case and length has processes of its own, which
this script starts, one per GPU; so memory is clean, and a case that runs out of memory harms no other.

    alst     DeepSpeed's ALST on transformers' LLaMA (`benchmarks/alst.py` lists its settings and their sources)
    plain    this repository without FPDT: Ulysses with activation checkpointing (--plain)
    fpdt     this repository with FPDT and offloading (--chunk, --device-memory)

ALST's attention is `same-kernel` by default: the kernel of the other cases, registered with transformers as a user
would register any function. --attention sdpa, flash_attention_2 or another name of transformers replaces it.
torch's ring attention (`context_parallel`) is not a case: it replaces torch's fused CUDA kernels alone, so it can
neither run the same kernel nor be checked against the others on a CPU.

Model FLOPs are the same for all (`megatron.planner.flops`). "first loss" and "first norm" (of the gradient) are those
of the first step: the cases must agree to --loss-tolerance and --norm-tolerance, else the exit code is 1. "GPU GiB" is
the peak of live tensors, "reserved" what torch's allocator took, both of the rank with the most. "process" is the peak
host memory of the largest process, and "host per rank" the drop of the machine's available memory over the number of
ranks, which counts pinned memory, and whatever else the machine does meanwhile.

--find-longest doubles the last of --seq-lengths until a case fails; its steps follow a short warm-up and are not
compared. --time-limit ends a case that is running and skips the rest; a JSON line per case is printed as soon as it
is measured, and the table at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, count
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import run_flags, training_step
from benchmarks.common import (
    GIB,
    TINY_GEOMETRY,
    Column,
    Geometry,
    Row,
    Table,
    add_geometry_flags,
    build_parser,
    describe_run,
    free_memory,
    geometry_of,
    parse,
    picture,
    run_script,
    thousands,
    token_axis,
)
from megatron.arguments import parse_args
from megatron.config import validate
from megatron.core.host_memory import available_host_bytes
from megatron.fpdt.host_pool import HostMemoryError
from megatron.launch.program import leave
from megatron.ranks.world import World

NAME = "peers"
CASES = ("alst", "plain", "fpdt")
COLUMNS = (
    Column("case", "case"),
    Column("length", "tokens"),
    Column("seconds", "seconds", ".3f"),
    Column("spread", "spread", ".1%"),
    Column("tokens_per_second_per_gpu", "tokens/s/GPU", ".0f"),
    Column("times_matmul", "x matmul", ".3f"),
    Column("peak_gib", "GPU GiB", ".1f"),
    Column("reserved_gib", "reserved", ".1f"),
    Column("process_gib", "process", ".1f"),
    Column("host_per_rank_gib", "host per rank", ".1f"),
    Column("first_loss", "first loss", ".5f"),
    Column("first_gradient_norm", "first norm", ".4f"),
)
TINY = {**TINY_GEOMETRY, "num_layers": 2, "vocab_size": 256, "seq_lengths": [128], "chunk": 48, "num_gpus": 2,
        "steps": 1}  # fmt: skip
QUICK = {"num_layers": 4, "seq_lengths": [65536]}
HIGHEST = ("peak_gib", "reserved_gib", "process_gib")  # over the ranks
OUT_OF_MEMORY = 3
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="[all]")
    parser.add_argument("--seq-lengths", nargs="+", type=int, default=[65536, 131072], help="tokens [%(default)s]")
    parser.add_argument("--num-gpus", type=int, default=max(torch.cuda.device_count(), 1), help="[all; %(default)s]")
    parser.add_argument("--num-layers", type=int, default=32, help="[%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=128256, help="[%(default)s]")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=3, help="[%(default)s]")
    parser.add_argument("--cpu-optimizer", action="store_true", help="optimizer states and steps on the host")
    parser.add_argument("--backend", default="auto", help="attention kernel of all cases [%(default)s]")
    parser.add_argument("--attention", default="same-kernel", help="ALST's, by transformers' name [%(default)s]")
    parser.add_argument("--plain", choices=run_flags.PLAIN, default="on-host", help="[%(default)s]")
    parser.add_argument("--chunk", default="auto", help="tokens per chunk of FPDT [%(default)s]")
    parser.add_argument(
        "--device-memory", default="auto", metavar="GIB", help="FPDT's chunks that may stay on the GPU [%(default)s]"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps timed, after one to warm up [%(default)s]")
    parser.add_argument("--short-warm-up", action="store_true", help="warm up with few tokens")
    parser.add_argument("--find-longest", action="store_true", help="double the last length until it does not fit")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="for everything [none]")
    parser.add_argument("--loss-tolerance", type=float, default=1e-4, help="relative [%(default)s]")
    parser.add_argument("--norm-tolerance", type=float, default=2e-3, help="relative [%(default)s]")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    add_geometry_flags(parser, Geometry())
    arguments = parse(parser, argv, QUICK, TINY)
    if arguments.num_gpus < 1 or arguments.num_attention_heads % arguments.num_gpus:
        parser.error(
            f"--num-gpus ({arguments.num_gpus}) must divide --num-attention-heads ({arguments.num_attention_heads})"
        )
    for length in arguments.seq_lengths:
        if length < 1 or length % arguments.num_gpus:
            parser.error(
                f"--seq-lengths ({length}) must be multiples of --num-gpus ({arguments.num_gpus}); "
                f"use {-(-max(length, 1) // arguments.num_gpus) * arguments.num_gpus}"
            )
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.worker:
        work(arguments)
    deadline = time.monotonic() + (arguments.time_limit or float("inf"))
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    header = describe_run(NAME, arguments, device)
    free_memory(device)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for row in measure_all(arguments, header["matmul_tflops"], deadline):
        rows.append(row)
        print(json.dumps(row), flush=True)
        path = arguments.output.with_name(arguments.output.name + ".json")
        path.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")
    table = Table(COLUMNS)
    print(f"\n{header['device']} x {arguments.num_gpus}, torch {header['torch']}, commit {header['commit']}, "
          f"matrix product {header['matmul_tflops']:.3g} TFLOP/s\n")  # fmt: skip
    print("\n".join([table.heading(), *(table.line(row) for row in rows), "", *comparisons(rows)]))
    if arguments.find_longest:
        print("\n".join(longest(rows, arguments.cases)))
    draw(rows, arguments.output, f"{header['device']} x {arguments.num_gpus}, commit {header['commit']}")
    wrong = disagreements(rows, arguments.loss_tolerance, arguments.norm_tolerance)
    print("\n".join(wrong) or "first losses and gradient norms agree")
    return 1 if wrong or all("failed" in row for row in rows) else 0


def measure_all(arguments: argparse.Namespace, matmul: float, deadline: float) -> Iterator[Row]:
    """Yield a row per case and length; with --find-longest also those of doubled lengths, up to a failure."""
    failed: set[str] = set()
    for length in arguments.seq_lengths:
        for case in arguments.cases:
            row = measure_case(case, length, arguments.short_warm_up, arguments, matmul, deadline)
            if "failed" in row:
                failed.add(case)
            yield row
    for case in arguments.cases if arguments.find_longest else ():
        for doublings in count(1):
            if case in failed:
                break
            length = arguments.seq_lengths[-1] * 2**doublings
            row = measure_case(case, length, True, arguments, matmul, deadline)
            if "failed" in row:
                failed.add(case)
            yield row


def measure_case(case: str, length: int, short_warm_up: bool, arguments: argparse.Namespace, matmul: float,
                 deadline: float) -> Row:  # fmt: skip
    """Measure one row in processes of its own."""
    row: Row = {"case": case, "seq_length": length, "length": thousands(length)}
    if time.monotonic() >= deadline:
        return row | {"failed": "not started: --time-limit"}
    folder = arguments.output.with_name(f"{arguments.output.name}-{case}-{length}")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("rank*"):
        path.unlink()
    words, started = worker_words(case, length, short_warm_up, arguments), time.monotonic()
    row |= run_ranks([*words, "--output", str(folder)], arguments.num_gpus, folder, deadline)
    row["elapsed_seconds"] = time.monotonic() - started
    if "failed" not in row:
        rates = training_step.rates(row, arguments.num_gpus, matmul, None)
        row |= {"times_matmul": rates["times_matmul"], "model_tflops": rates["model_tflops"],
                "tokens_per_second_per_gpu": rates["tokens_per_second"] / arguments.num_gpus}  # fmt: skip
    return row


def worker_words(case: str, length: int, short_warm_up: bool, arguments: argparse.Namespace) -> list[str]:
    """Return the flags of one rank's process, without its --output."""
    names = ("device", "num_gpus", "num_layers", "vocab_size", "zero_stage", "backend", "attention", "plain", "chunk",
             "device_memory", "steps", *vars(Geometry()))  # fmt: skip
    values = {name: getattr(arguments, name) for name in names} | {"worker": case, "seq_lengths": length}
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--cpu-optimizer"] if arguments.cpu_optimizer else []
    return words + (["--short-warm-up"] if short_warm_up else [])


def run_ranks(words: Sequence[str], num_ranks: int, folder: Path, deadline: float) -> Row:
    """Run one process per rank; return the ranks' row, or why there is none. All processes have ended afterwards."""
    shared = {**os.environ, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    shared.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    shared.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_ranks, 1)))
    available, lowest = available_host_bytes(), available_host_bytes()
    ranks = [start_rank(words, shared, rank, folder) for rank in range(num_ranks)]
    in_time = True
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                in_time = any(rank.poll() for rank in ranks)
                break
            lowest = min(lowest, available_host_bytes())
            time.sleep(POLL_SECONDS)
    finally:
        codes = [rank.poll() for rank in ranks]
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
    if not in_time:
        return {"failed": "ended by --time-limit"}
    return row_of_ranks(codes, folder) | {"host_per_rank_gib": (available - lowest) / GIB / num_ranks}


def start_rank(words: Sequence[str], shared: Mapping[str, str], rank: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start one rank, which writes its log into the folder."""
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def row_of_ranks(codes: Sequence[int | None], folder: Path) -> Row:
    """Return the first rank's row with the highest memory of all ranks, or the failure of the rank that failed."""
    paths = [folder / f"rank{rank}.json" for rank in range(len(codes))]
    rows = [json.loads(path.read_text()) for path in paths if path.exists()]
    for row in rows:
        if "failed" in row:
            return row
    for rank, code in enumerate(codes):
        if code:
            reason = "killed, perhaps for host memory" if code == -signal.SIGKILL else f"exit code {code}"
            lines = (folder / f"rank{rank}.log").read_text(errors="replace").strip().splitlines() or [""]
            return {"failed": f"rank {rank}: {reason}: {lines[-1][:200]} ({folder}/rank{rank}.log)"}
    highest = {name: max(row[name] for row in rows) for name in HIGHEST if rows[0].get(name) is not None}
    return rows[0] | highest


def work(arguments: argparse.Namespace) -> NoReturn:
    """Measure one case on one rank and write its row. Leaves at once when memory runs out, as others may be waiting."""
    rank, num_ranks = World.from_environment().rank, World.from_environment().size
    path = arguments.output / f"rank{rank}.json"
    try:
        row = measure_rank(arguments, num_ranks)
    except (torch.OutOfMemoryError, HostMemoryError, MemoryError, RuntimeError) as error:
        reason = reason_of(error)
        if reason is None:
            raise
        path.write_text(json.dumps({"failed": reason}))
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(OUT_OF_MEMORY)
    path.write_text(json.dumps(row))
    torch.distributed.destroy_process_group()
    leave(0)


def reason_of(error: BaseException) -> str | None:
    """Return which memory ran out; None for another error. NCCL and pinned memory report theirs in words alone."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory"
    if isinstance(error, HostMemoryError | MemoryError):
        return "out of host memory"
    return "out of memory (GPU or pinned)" if "out of memory" in str(error).lower() else None


def measure_rank(arguments: argparse.Namespace, num_ranks: int) -> Row:
    """Measure the case of `--worker` on this rank. Collective over all ranks."""
    step = training_step.parse_arguments(step_words(arguments))
    config = parse_args(training_step.training_flags(step, num_ranks))
    validate(config, num_ranks, arguments.device)
    if arguments.worker != "alst":
        return training_step.measure_steps(config, step, num_ranks)
    from benchmarks import alst  # imports transformers and DeepSpeed, which takes a while

    step.attention = arguments.attention
    return alst.measure_steps(config, step, num_ranks)


def step_words(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of training_step.py for the case; ALST takes model and optimizer from them."""
    names = ("device", "num_layers", "vocab_size", "zero_stage", "backend", "steps")
    values = {name: getattr(arguments, name) for name in names} | vars(geometry_of(arguments))
    values["seq_length"] = arguments.seq_lengths[0]
    if arguments.worker == "fpdt":
        values |= {"chunk": arguments.chunk, "device_memory": arguments.device_memory}
    else:
        values["plain"] = arguments.plain
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--step-only", *["--cpu-optimizer"] * arguments.cpu_optimizer]
    return words + (["--short-warm-up"] if arguments.short_warm_up else [])


def comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per length and peer that says how fast FPDT is against it, and its GPU memory."""
    measured = {(row["case"], row["seq_length"]): row for row in rows if "failed" not in row}
    for (case, length), ours in measured.items():
        for peer in ("alst", "plain") if case == "fpdt" else ():
            if theirs := measured.get((peer, length)):
                memory = ""
                if ours["peak_gib"] is not None and theirs["peak_gib"]:
                    memory = f" in {ours['peak_gib'] / theirs['peak_gib']:.2f} x its GPU memory"
                speed = ours["tokens_per_second_per_gpu"] / theirs["tokens_per_second_per_gpu"]
                yield f"fpdt, {thousands(length)} tokens: {speed:.2f} x {peer}'s tokens/s{memory}"


def longest(rows: Sequence[Row], cases: Sequence[str]) -> Iterator[str]:
    """Yield a line per case with the longest sequence that fit, and what stopped the next."""
    for case in cases:
        own = [row for row in rows if row["case"] == case]
        fit = max((row["seq_length"] for row in own if "failed" not in row), default=0)
        ends = [f"{row['length']}: {row['failed']}" for row in own if "failed" in row]
        yield f"{case}: {thousands(fit) if fit else 'none'} fit; {'; '.join(ends) or 'no failure'}"


def disagreements(rows: Sequence[Row], loss_tolerance: float, norm_tolerance: float) -> list[str]:
    """Return a line per pair of cases whose first losses or gradient norms differ by more than the tolerance."""
    lines = []
    for a, b in combinations([row for row in rows if "first_loss" in row], 2):
        if a["seq_length"] != b["seq_length"]:
            continue
        for name, limit in (("first_loss", loss_tolerance), ("first_gradient_norm", norm_tolerance)):
            if not abs(a[name] - b[name]) <= limit * abs(b[name]):  # also for what is not a number
                lines.append(f"{a['length']} tokens: {name} is {a[name]:.6g} for {a['case']} and {b[name]:.6g} for "
                             f"{b['case']}; {limit:.2g} relative is allowed")  # fmt: skip
    return lines


def draw(rows: Sequence[Row], output: Path, title: str) -> None:
    """Plot the rate over the length."""
    with picture(output.with_name(output.name + ".png"), 1, title) as (panel,):
        for case in CASES:
            own = sorted((row["seq_length"], row["tokens_per_second_per_gpu"])
                         for row in rows if row["case"] == case and "failed" not in row)  # fmt: skip
            if own:
                panel.plot(*zip(*own, strict=True), "o-", label=case)
                panel.legend()
        token_axis(panel, "tokens")
        panel.set(ylabel="tokens/s per GPU")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no rank stays behind
    sys.exit(run_script(main))
