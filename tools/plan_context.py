#!/usr/bin/env python3
"""Estimate the memory and step time of a long-context run, and the longest context that fits.

    tools/plan_context.py --model llama-8b --gpus 4 --gpu H100 --seq-length 1048576
    tools/plan_context.py --model path/to/config.json --gpus 8 --gpu A100-80GB --host-memory 1900
    tools/plan_context.py --gpus 4 --gpu H200 -- --num-layers 32 --hidden-size 4096 ...     flags of pretrain_gpt.py
    tools/plan_context.py --published     estimates for published configurations next to the published results

The estimates are for FPDT with offloading, in bf16, per GPU unless they say otherwise. By default all GPUs share one
sequence, and the chunk is the one with the fastest step. docs/planner.md explains the estimates and compares them with
measurements. Exit code 1 if the run does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argument_types import real

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from planning.inputs import completed, plan_of, states_training_length, token_budget, training_of, variants_of
from planning.output import Answer, figures_of, lines_of
from planning.plot import draw

from megatron.arguments import token_count
from megatron.config import ConfigError
from megatron.config.packages import require_package
from megatron.core.host_memory import available_host_bytes
from megatron.planner.hardware import GIB, GPUS
from megatron.planner.models import MODEL_NAMES, PUBLISHED_NAMES
from megatron.planner.published import published_table
from megatron.ranks.interrupts import run_tool

DEFAULT_LENGTH = 262144
GPUS_PER_NODE = 8
LARGEST_COUNT = 2**31 - 1
SCRIPT_FLAGS = "--"
ABOVE_ZERO = real(0, "100", open_low=True)
# Settings that the training flags give; before -- they would have no effect.
DESCRIBED_BY_TRAINING = {
    "--model", "--seq-length", "--chunk-size", "--sequence-parallel", "--micro-batch-size", "--zero-stage",
    "--lora-rank", "--quantize-base", "--cpu-optimizer", "--device-memory", "--train-tokens", "--train-samples",
}  # fmt: skip


def host_memory(text: str) -> float:
    """Parse GiB, or `here` for the free memory of this machine within its cgroup limit."""
    return available_host_bytes() / GIB if text == "here" else ABOVE_ZERO(text)


def device_memory(text: str) -> float | None:
    """Parse GiB, or `auto`."""
    return None if text == "auto" else real(0, "40")(text)


def count(text: str) -> int:
    """Parse a whole number from 1 to the largest of 32 bits."""
    if not text.isdecimal() or not 1 <= float(text) <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from 1 to {LARGEST_COUNT}; give one, such as 8"
        )
    return int(text)


def length(text: str) -> int:
    """Parse the tokens of a length, such as 262144, 262,144 or 256K."""
    tokens = token_count(text)
    if not 1 <= tokens <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} must be from 1 to {LARGEST_COUNT}; give for example 256K")
    return tokens


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    argv = list(argv)
    training = argv.index(SCRIPT_FLAGS) if SCRIPT_FLAGS in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join((*MODEL_NAMES, *PUBLISHED_NAMES))
    parser.add_argument("--model", help=f"a Hugging Face folder or config.json, or one of {names}")
    parser.add_argument("--vocab-size", type=count, help="tokens of the vocabulary, where the model does not define it")
    machine = parser.add_argument_group("machines")
    machine.add_argument("--gpus", type=count, default=1, help="total number of GPUs [%(default)s]")
    machine.add_argument("--gpus-per-node", type=count, default=GPUS_PER_NODE, help="[%(default)s]")
    machine.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)} [H100]")
    machine.add_argument("--gpu-memory", type=ABOVE_ZERO, metavar="GIB", help="[the GPU's]")
    machine.add_argument("--gpu-tflops", type=ABOVE_ZERO, metavar="TFLOP/s",
                         help="dense bf16 peak of a GPU without a name, which its other rates follow")  # fmt: skip
    machine.add_argument("--host-memory", type=host_memory, default=1900.0,
                         help="GiB per machine, or `here` for the free memory of this one [%(default)s]")  # fmt: skip
    machine.add_argument("--disk-memory", type=ABOVE_ZERO, metavar="GiB",
                         help="GiB per machine on disks, for chunks that the host has no room for [none]")  # fmt: skip
    machine.add_argument("--disk", type=ABOVE_ZERO, nargs=2, metavar="GB/s",
                         help="at which the disks of a machine read and write [5 3]")  # fmt: skip
    machine.add_argument("--link", type=ABOVE_ZERO, nargs="+", metavar="GB/s",
                         help="between each GPU and its host while all of a machine copy: one way, or in, out and both "
                         "ways together [the GPU's]")  # fmt: skip
    machine.add_argument("--network", type=ABOVE_ZERO, default=50, help="GB/s per GPU between machines [%(default)s]")
    job = parser.add_argument_group("run, unless flags of pretrain_gpt.py describe it")
    job.add_argument("--seq-length", type=length, default=DEFAULT_LENGTH, metavar="TOKENS",
                     help="such as 256K or 4M, K being 1024 [256K]")  # fmt: skip
    job.add_argument("--chunk-size", type=length, metavar="TOKENS", help="over all GPUs of a sequence [the fastest]")
    job.add_argument("--sequence-parallel", type=count, help="GPUs that share a sequence [all]")
    job.add_argument("--micro-batch-size", type=count, default=1, help="[%(default)s]")
    job.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=3, help="[%(default)s]")
    job.add_argument("--lora-rank", type=count, help="train adapters of this rank on the frozen model [all weights]")
    job.add_argument("--quantize-base", choices=("nf4",), help="the frozen weights of its blocks in 4 bits [16 bits]")
    job.add_argument("--cpu-optimizer", action="store_true", help="optimizer states and step on the host")
    job.add_argument("--device-memory", type=device_memory, metavar="GIB",
                     help="chunks that may stay on a GPU, or `auto` for what it has room for [auto]")  # fmt: skip
    budget = job.add_mutually_exclusive_group()
    budget.add_argument("--train-tokens", type=token_budget, metavar="TOKENS",
                        help="of the whole training run, such as 10B, to say how long it takes")  # fmt: skip
    budget.add_argument("--train-samples", type=count, help="the same in sequences")
    job.add_argument("--backend", help="attention kernel [the GPU's fastest]")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="write the estimates to a file")
    output.add_argument("--plot", type=Path, help="plot memory and time over length to a PNG")
    output.add_argument("--published", action="store_true", help="print the table of published configurations")
    arguments = parser.parse_args(argv[:training])
    flags = argv[training + 1 :]
    try:
        arguments.training, arguments.training_length_is_given = completed(flags), states_training_length(flags)
    except ConfigError as error:
        parser.error(str(error))
    if not (arguments.published or arguments.model or arguments.training):
        parser.error("--model is missing; name one, or give flags of pretrain_gpt.py after --")
    described_twice = sorted(DESCRIBED_BY_TRAINING & {flag.split("=")[0] for flag in argv[:training]})
    if arguments.training and described_twice:
        parser.error(
            f"{', '.join(described_twice)} before -- would be overruled by the flags of pretrain_gpt.py after it; "
            "leave either out"
        )
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.published:
        print("\n".join(published_table()))
        return 0
    try:
        if arguments.plot:
            require_package("matplotlib", f"--plot ({arguments.plot})")
        plan, choices = plan_of(arguments)
        answer = Answer.of(plan, choices, variants_of(plan.job), training_of(arguments, plan, choices))
        lines = lines_of(answer, datetime.now())
    except (ConfigError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print("\n".join(lines))
    try:
        write_files(answer, arguments)
    except (OSError, ValueError) as error:  # ValueError: a picture format that matplotlib does not know
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if plan.fits else 1


def write_files(answer: Answer, arguments: argparse.Namespace) -> None:
    """Write the JSON file and the plot that the command line asks for."""
    for file in filter(None, (arguments.json, arguments.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures_of(answer), indent=2) + "\n")
    if arguments.plot:
        draw(answer, arguments.plot)


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
