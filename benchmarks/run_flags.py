"""Flags of benchmarks that measure training steps, and the flags of the training run that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megatron.config import Recompute
from megatron.ranks.world import World

PLAIN = {"kept": [], "recomputed": ["checkpoint_activations"],
         "on-host": ["checkpoint_activations", "checkpoint_in_cpu"]}  # fmt: skip


def chunk_size(text: str) -> int:
    """Parse a number of tokens; 0 for auto."""
    return 0 if text == "auto" else int(text)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that are not of the model."""
    parser.add_argument("--seq-length", type=int, default=262144, help="tokens [%(default)s]")
    parser.add_argument("--chunk", type=chunk_size, default=32768,
                        help="tokens per chunk, or auto with --step-only [%(default)s]")  # fmt: skip
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=3, help="[%(default)s]")
    parser.add_argument("--cpu-optimizer", action="store_true", help="optimizer states and steps on the host")
    parser.add_argument("--on-device", action="store_true", help="without offloading")
    parser.add_argument("--plain", choices=PLAIN, help="without FPDT, with activations saved (kept), recomputed, or "
                        "recomputed from inputs on the host; measures no block")  # fmt: skip
    parser.add_argument("--device-memory", default="0", metavar="GIB",
                        help="chunks that may stay on the GPU, or auto [%(default)s]")  # fmt: skip
    parser.add_argument("--recompute", type=Recompute, choices=[*Recompute],
                        help="matmuls to recompute [by memory and the link's bandwidth]")  # fmt: skip
    parser.add_argument("--checkpoint-interval", type=int, metavar="K",
                        help="save the input of every Kth block [the smallest K that fits]")  # fmt: skip
    parser.add_argument("--backend", default="auto", help="attention kernel [%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="steps timed, after one to warm up [%(default)s]")
    parser.add_argument("--short-warm-up", action="store_true",
                        help="warm up with two chunks; the timed step then allocates the host memory")  # fmt: skip
    parser.add_argument("--no-warm-up", action="store_true",
                        help="time the first step, which loads and compiles kernels, too")  # fmt: skip
    parser.add_argument("--gpu-memory-limit", type=float, metavar="GIB",
                        help="plan for a GPU with so much memory, and let torch allocate no more")  # fmt: skip
    parser.add_argument("--host-memory-limit", type=float, metavar="GIB",
                        help="plan for a host with so much free memory per GPU")  # fmt: skip
    parser.add_argument(
        "--as-one-of", type=int, metavar="GPUS", help="simulate one of so many ranks that share a sequence"
    )
    parser.add_argument("--step-only", action="store_true", help="without the block")
    parser.add_argument("--deterministic-mode", action="store_true", help="deterministic kernels only")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")


def check_run_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with a usage error where flags contradict each other."""
    if not (arguments.chunk or arguments.step_only):
        parser.error("--chunk auto plans a step, not a block; add --step-only")
    if arguments.no_warm_up and arguments.short_warm_up:
        parser.error("--no-warm-up and --short-warm-up contradict each other; leave out one")
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    num_processes = World.from_environment().size
    if arguments.as_one_of is not None and (arguments.as_one_of < 2 or num_processes > 1):
        parser.error(
            f"--as-one-of ({arguments.as_one_of}) plays 2 or more GPUs in a single process, not in {num_processes}; "
            "leave it out for one GPU, or the launcher"
        )


def num_gpus_of(arguments: argparse.Namespace) -> int:
    """Return the ranks that share the sequence, simulated ones counted."""
    return arguments.as_one_of or World.from_environment().size


def run_flags(arguments: argparse.Namespace, num_gpus: int) -> list[str]:
    """Return those that are not of the model. Tokens are random, so --data-path names no real dataset."""
    values = {
        "seq_length": arguments.seq_length, "lr": 1e-4,
        "attention_backend": arguments.backend, "zero_stage": arguments.zero_stage,
        "train_iters": arguments.steps + 1, "eval_iters": 0, "data_path": "random",
        "tokenizer_type": "NullTokenizer", "vocab_size": arguments.vocab_size, "ds_sequence_parallel_size": num_gpus,
    }  # fmt: skip
    switches = []
    if arguments.plain:
        switches += PLAIN[arguments.plain]
    else:
        values["ds_sequence_parallel_fpdt_chunk_size"] = arguments.chunk
        switches.append("ds_sequence_parallel_fpdt")
        if not arguments.on_device:
            switches.append("ds_sequence_parallel_fpdt_offloading")
            values["ds_sequence_parallel_fpdt_device_memory"] = arguments.device_memory
    if arguments.device == "cuda":
        switches.append("bf16")
    switches += [name for name in ("cpu_optimizer", "deterministic_mode") if getattr(arguments, name)]
    if arguments.recompute:
        values["ds_sequence_parallel_fpdt_recompute"] = arguments.recompute
    if arguments.checkpoint_interval:
        values["ds_sequence_parallel_fpdt_checkpoint_interval"] = arguments.checkpoint_interval
    return as_flags(values, switches)


def as_flags(values: dict[str, Any], switches: Sequence[str]) -> list[str]:
    """Spell settings as flags."""
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *(f"--{name.replace('_', '-')}" for name in switches)]
