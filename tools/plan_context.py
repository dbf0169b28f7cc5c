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
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from argument_types import real

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from megatron.arguments import expand_files, parse_args
from megatron.config import (
    AdaptersConfig,
    Config,
    ConfigError,
    HuggingFaceModelConfig,
    ModelConfig,
    TokenizerConfig,
    validate,
)
from megatron.config.packages import require_package
from megatron.core.host_memory import available_host_bytes
from megatron.core.link_rates import LinkRates
from megatron.hf.settings import read_model, with_adapters, with_hugging_face_model
from megatron.planner.hardware import GIB, GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.models import MODEL_NAMES, named_model
from megatron.planner.plan import Plan
from megatron.planner.published import published_table
from megatron.planner.report import execution_lines
from megatron.planner.solver import Open, fastest, with_free_device_memory
from megatron.ranks.interrupts import run_tool
from megatron.tokenizer import TokenizerError, tokenizer_of

DEFAULT_LENGTH = 262144
DEFAULT_VOCABULARY = 50304
GPUS_PER_NODE = 8
LARGEST_COUNT = 2**31 - 1
SCRIPT_FLAGS = "--"
ABOVE_ZERO = real(0, "100", open_low=True)
# Required flags that no plan depends on: alternatives, one of which is needed, and a value for the first.
STAND_INS = (
    (("--lr",), "1e-4"),
    (("--train-iters", "--train-samples", "--train-tokens"), "1"),
    (("--data-path", "--train-data-path"), "none"),
)
# Settings that the training flags give; before -- they would have no effect.
DESCRIBED_BY_TRAINING = {
    "--model", "--seq-length", "--chunk-size", "--sequence-parallel", "--micro-batch-size", "--zero-stage",
    "--lora-rank", "--quantize-base", "--cpu-optimizer", "--device-memory",
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


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    argv = list(argv)
    training = argv.index(SCRIPT_FLAGS) if SCRIPT_FLAGS in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help=f"{', '.join(MODEL_NAMES)}, or a Hugging Face folder or config.json")
    parser.add_argument("--vocab-size", type=count, help="tokens of the vocabulary, where the model does not define it")
    machine = parser.add_argument_group("machines")
    machine.add_argument("--gpus", type=count, default=1, help="total number of GPUs [%(default)s]")
    machine.add_argument("--gpus-per-node", type=count, default=GPUS_PER_NODE, help="[%(default)s]")
    machine.add_argument("--gpu", choices=GPUS, default="H100", help="[%(default)s]")
    machine.add_argument("--gpu-memory", type=ABOVE_ZERO, help="GiB [the GPU's]")
    machine.add_argument("--host-memory", type=host_memory, default=1900.0,
                         help="GiB per machine, or `here` for the free memory of this one [%(default)s]")  # fmt: skip
    machine.add_argument("--link", type=ABOVE_ZERO, nargs="+", metavar="GB/s",
                         help="between each GPU and its host while all of a machine copy: one way, or in, out and both "
                         "ways together [the GPU's]")  # fmt: skip
    machine.add_argument("--network", type=ABOVE_ZERO, default=50, help="GB/s per GPU between machines [%(default)s]")
    job = parser.add_argument_group("run, unless flags of pretrain_gpt.py describe it")
    job.add_argument("--seq-length", type=count, default=DEFAULT_LENGTH, help="tokens [%(default)s]")
    job.add_argument("--chunk-size", type=count, help="tokens over all GPUs of a sequence [the fastest]")
    job.add_argument("--sequence-parallel", type=count, help="GPUs that share a sequence [all]")
    job.add_argument("--micro-batch-size", type=count, default=1, help="[%(default)s]")
    job.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=3, help="[%(default)s]")
    job.add_argument("--lora-rank", type=count, help="train adapters of this rank on the frozen model [all weights]")
    job.add_argument("--quantize-base", choices=("nf4",), help="the frozen weights of its blocks in 4 bits [16 bits]")
    job.add_argument("--cpu-optimizer", action="store_true", help="optimizer states and step on the host")
    job.add_argument("--device-memory", type=device_memory, metavar="GIB",
                     help="chunks that may stay on a GPU, or `auto` for what it has room for [auto]")  # fmt: skip
    job.add_argument("--backend", help="attention kernel [the GPU's fastest]")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="write the estimates to a file")
    output.add_argument("--plot", type=Path, help="plot memory and time over length to a PNG")
    output.add_argument("--published", action="store_true", help="print the table of published configurations")
    arguments = parser.parse_args(argv[:training])
    arguments.training = argv[training + 1 :]
    if not (arguments.published or arguments.model or arguments.training):
        parser.error("--model is missing; name one, or give flags of pretrain_gpt.py after --")
    described_twice = sorted(DESCRIBED_BY_TRAINING & {flag.split("=")[0] for flag in argv[:training]})
    if arguments.training and described_twice:
        parser.error(
            f"{', '.join(described_twice)} before -- would be overruled by the flags of pretrain_gpt.py after it; "
            "leave either out"
        )
    return arguments


def completed(flags: Sequence[str]) -> list[str]:
    """Add stand-ins for required flags that a plan does not depend on, where neither `flags` nor their files have them.

    [] stays [].
    """
    given = {word.split("=")[0] for word in expand_files(flags)}
    missing = [(names[0], value) for names, value in STAND_INS if given.isdisjoint(names)] if flags else []
    return [*flags, *chain.from_iterable(missing)]


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.published:
        print("\n".join(published_table()))
        return 0
    try:
        if arguments.plot:
            require_package("matplotlib", f"--plot ({arguments.plot})")
        plan, choices = plan_of(arguments)
        lines = lines_of(plan, choices)
    except (ConfigError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print("\n".join(lines))
    try:
        write_files(plan, choices, arguments)
    except (OSError, ValueError) as error:  # ValueError: a picture format that matplotlib does not know
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if plan.fits else 1


def write_files(plan: Plan, choices: Open, arguments: argparse.Namespace) -> None:
    """Write the JSON file and the plot that the command line asks for."""
    for file in filter(None, (arguments.json, arguments.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures_of(plan, choices), indent=2) + "\n")
    if arguments.plot:
        draw(plan, arguments.plot)


def plan_of(arguments: argparse.Namespace) -> tuple[Plan, Open]:
    """Return the plan that the command line asks for, and what of it was left open."""
    gpu = GPUS[arguments.gpu]
    gpu = replace(gpu, memory_gib=arguments.gpu_memory or gpu.memory_gib)
    per_node = min(arguments.gpus_per_node, arguments.gpus)
    machines = Machines(
        gpu, arguments.gpus, per_node, arguments.host_memory, arguments.network, link_of(arguments.link)
    )
    flags = completed(arguments.training)
    config = with_hugging_face_model(parse_args(flags), arguments.gpus) if flags else None
    job = job_of_model(arguments) if config is None else job_of_config(config, arguments)
    asked = arguments.backend or (config.model.attention_backend if config else "auto")
    backend = gpu.rated(asked)
    if backend is None:
        known = ", ".join(gpu.attention)
        raise ConfigError(f"--backend ({asked}) has no rates for the {gpu.name} here; use one of {known}")
    shared = job.sequence_parallel_size
    if job.num_gpus % shared:
        allowed = [n for n in range(1, job.num_gpus + 1) if job.num_gpus % n == 0]
        raise ConfigError(
            f"--sequence-parallel ({shared}) must divide the {job.num_gpus} GPUs; use one of "
            f"{', '.join(map(str, allowed))}"
        )
    plan = Plan(job, machines, backend)
    if not job.streamed:
        return plan, Open()
    choices = Open.of(config) if config else Open(arguments.chunk_size is None, arguments.device_memory is None)
    return fastest(plan, choices) or (with_free_device_memory(plan) if choices.device_memory else plan), choices


def link_of(rates: list[float] | None) -> LinkRates | None:
    """Return the rates of --link; a single one is taken for both directions, alone and together."""
    match rates:
        case None:
            return None
        case [rate]:
            return LinkRates(rate, rate, rate)
        case [to_gpu, to_host, both_ways]:
            return LinkRates(to_gpu, to_host, both_ways)
    raise ConfigError(f"--link takes one rate or three, not {len(rates)}; give in, out and both ways together")


def model_called(name: str, seq_length: int) -> tuple[ModelConfig, int]:
    """Return (model, vocabulary size) of a name, or of a Hugging Face folder or its config.json."""
    if name in MODEL_NAMES:
        return named_model(name, seq_length)
    if not Path(name).exists():
        raise ConfigError(
            f"--model ({name}) is neither a folder, nor a file, nor one of {', '.join(MODEL_NAMES)}; give one of them"
        )
    flags = ModelConfig(hf_model=name, num_layers=0, hidden_size=0, num_attention_heads=0, seq_length=seq_length)
    model = read_model(Path(name), flags)
    return model, model.embedding_rows


def job_of_model(arguments: argparse.Namespace) -> Job:
    model, vocabulary = model_called(arguments.model, arguments.seq_length)
    if arguments.lora_rank is not None:
        if not isinstance(model, HuggingFaceModelConfig):
            raise ConfigError(
                f"--lora-rank ({arguments.lora_rank}) is for Hugging Face models, and --model ({arguments.model}) is "
                "none; name a folder or a config.json"
            )
        require_package("peft", "--lora-rank")
        adapters = AdaptersConfig(lora_rank=arguments.lora_rank, quantize_base=arguments.quantize_base)
        model = with_adapters(model, adapters)
    elif arguments.quantize_base is not None:
        raise ConfigError("--quantize-base (nf4) has no effect without adapters; add --lora-rank")
    shared = arguments.sequence_parallel or arguments.gpus
    return Job(
        model=model,
        padded_vocab_size=model.num_rows(arguments.vocab_size or vocabulary),
        num_gpus=arguments.gpus,
        chunk_length=arguments.chunk_size or min(32768 * shared, arguments.seq_length),
        sequence_parallel_size=shared,
        micro_batch_size=arguments.micro_batch_size,
        zero_stage=arguments.zero_stage,
        cpu_optimizer=arguments.cpu_optimizer,
        device_memory_bytes=int((arguments.device_memory or 0) * GIB),
    )


def job_of_config(config: Config, arguments: argparse.Namespace) -> Job:
    parallel = config.parallel
    if parallel.ds_sequence_parallel_fpdt and not parallel.ds_sequence_parallel_fpdt_offloading:
        raise ConfigError(
            "runs with --ds-sequence-parallel-fpdt are planned here with --ds-sequence-parallel-fpdt-offloading only; "
            "add it"
        )
    is_counted = isinstance(config.model, HuggingFaceModelConfig)
    vocabulary = 0 if is_counted else arguments.vocab_size or vocabulary_of(config.tokenizer)
    validate(config, arguments.gpus, "cuda")
    return Job.of(config, arguments.gpus, config.model.num_rows(vocabulary))


def vocabulary_of(tokenizer: TokenizerConfig) -> int:
    """Return the vocabulary size of a run's tokenizer; a default, with a note, where its files are missing."""
    try:
        return tokenizer_of(tokenizer).vocab_size
    except TokenizerError as error:
        sys.stderr.write(
            f"a vocabulary of {DEFAULT_VOCABULARY} tokens is assumed; --vocab-size before -- sets it: {error}\n"
        )
        return DEFAULT_VOCABULARY


def figures_of(plan: Plan, choices: Open) -> dict[str, Any]:
    """Return all estimates by name; memory in GiB per GPU."""
    job, memory, speed = plan.job, plan.memory, plan.speed
    with_any_chunk = fastest(plan, replace(choices, chunk=True))
    return {
        "gpu": plan.machines.gpu.name, "gpus": job.num_gpus, "parameters": job.num_parameters,
        "seq_length": job.model.seq_length, "chunk_length": job.chunk_length,
        "sequence_parallel_size": job.sequence_parallel_size, "zero_stage": job.zero_stage,
        "attention_backend": plan.backend, "recompute": memory.recompute,
        "checkpoint_interval": memory.checkpoint_interval,
        "gpu_gib": memory.gpu / GIB, "gpu_gib_with_overhead": memory.gpu_with_overhead / GIB,
        "gpu_states_gib": memory.states / GIB, "gpu_above_gib": (memory.gpu - memory.states) / GIB,
        "host_gib": memory.host / GIB, "host_chunks_gib": memory.host_chunks / GIB,
        "step_seconds": speed.step, "forward_seconds": speed.forward, "backward_seconds": speed.backward,
        "head_seconds": speed.head, "optimizer_seconds": speed.optimizer, "waiting_seconds": speed.waiting,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu, "mfu": plan.mfu,
        "fits_gpu": plan.fits_gpu, "fits_host": plan.fits_host, "longest_context": plan.longest_context(),
        "smallest_hiding_chunk": plan.smallest_hiding_chunk(),
        "fastest_chunk": None if with_any_chunk is None else with_any_chunk.job.chunk_length,
        "advice": plan.advice(),
    }  # fmt: skip


def headline(plan: Plan) -> str:
    """Say which run is planned, on which GPUs."""
    job = plan.job
    execution = f"chunk {job.chunk_length:,}" if job.streamed else f"activations {job.activations}"
    return (
        f"{job.num_parameters / 1e9:.2f}B parameters on {job.num_gpus} {plan.machines.gpu.name}, "
        f"{job.model.seq_length:,} tokens, {execution}, sequence parallel {job.sequence_parallel_size}, "
        f"ZeRO-{job.zero_stage}, {plan.backend}"
    )


def lines_of(plan: Plan, choices: Open) -> list[str]:
    """Format the estimates as lines of text."""
    job, hiding, heads = plan.job, plan.smallest_hiding_chunk(), plan.job.shape.heads
    lines = [
        headline(plan),
        "",
        *execution_lines(plan, choices),
        *[f"  attention           {heads}"] * bool(heads.num_heads % heads.num_ranks),
        "",
        f"longest context  {plan.longest_context():9,} tokens",
    ]
    if job.streamed:
        lines.append(f"smallest chunk that hides copies behind compute: {f'{hiding:,} tokens' if hiding else 'none'}")
    if plan.fits:
        return [*lines, "it fits; flags: " + " ".join(flags_of(job))]
    where = " and ".join(name for name, fits in (("GPU", plan.fits_gpu), ("host", plan.fits_host)) if not fits)
    return [*lines, f"it does not fit the {where}:", *(f"  - {line}" for line in plan.advice())]


def flags_of(job: Job) -> list[str]:
    """Return the flags of pretrain_gpt.py for the execution of the job."""
    flags = [
        f"--seq-length {job.model.seq_length}", f"--ds-sequence-parallel-size {job.sequence_parallel_size}",
        f"--zero-stage {job.zero_stage}", *["--cpu-optimizer"] * job.cpu_optimizer,
    ]  # fmt: skip
    if job.streamed:
        chunk = f"--ds-sequence-parallel-fpdt-chunk-size {job.chunk_length}"
        on_device = job.device_memory_bytes / GIB
        return [
            *flags, "--ds-sequence-parallel-fpdt", chunk, "--ds-sequence-parallel-fpdt-offloading",
            *[f"--ds-sequence-parallel-fpdt-device-memory {on_device:g}"] * bool(on_device),
        ]  # fmt: skip
    return flags + {
        "kept": [],
        "recomputed": ["--deepspeed-activation-checkpointing"],
        "recomputed from the host": ["--deepspeed-activation-checkpointing", "--checkpoint-in-cpu"],
    }[job.activations]  # fmt: skip


def draw(plan: Plan, path: Path) -> None:
    """Plot GPU and host memory, and the time of a step, over the length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    smallest = 8192 * plan.job.sequence_parallel_size
    longest = max(plan.longest_context(), plan.job.model.seq_length, smallest)
    lengths = [smallest * 2**n for n in range((longest // smallest).bit_length())]
    plans = [plan.with_job(plan.job.at(length)) for length in lengths]
    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    memory.plot(lengths, [each.memory.gpu_with_overhead / GIB for each in plans], marker="o", label="GPU")
    memory.plot(lengths, [each.memory.host / GIB for each in plans], marker="s", label="host, per GPU")
    memory.axhline(plan.machines.gpu.memory_gib, linestyle="--", color="C0", linewidth=1)
    memory.axhline(plan.machines.host_bytes_per_gpu / GIB, linestyle="--", color="C1", linewidth=1)
    memory.set(ylabel="GiB; dashed: available", yscale="log")
    memory.legend()
    time.plot(lengths, [each.speed.step for each in plans], marker="o")
    time.set(ylabel="seconds per step", yscale="log")
    for panel in (memory, time):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_formatter(lambda tokens, _: f"{int(tokens) // 1024}K")
    figure.suptitle(headline(plan), fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
