"""The run and the machines that the command line of tools/plan_context.py describes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

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
from megatron.core.disk_rates import DiskRates
from megatron.core.link_rates import LinkRates
from megatron.hf.settings import model_of_config, read_model, with_adapters, with_hugging_face_model
from megatron.planner.hardware import GIB, HOST_HEADROOM, Gpu, Machines, gpu_called, gpu_of_data_sheet
from megatron.planner.job import Job
from megatron.planner.models import MODEL_NAMES, PUBLISHED_NAMES, named_model, published_config
from megatron.planner.plan import Plan
from megatron.planner.reach import Variant
from megatron.planner.solver import Open, fastest, with_free_device_memory
from megatron.planner.training import Phase, Training, shorter_plans
from megatron.tokenizer import TokenizerError, tokenizer_of
from megatron.training.lengths import phases_of_run

DEFAULT_GPU = "H100"
DEFAULT_DISK = (5.0, 3.0)  # GB/s of a machine, read and written
DEFAULT_VOCABULARY = 50304
LORA_RANK = 16
TRAINING_LENGTH = ("--train-iters", "--train-samples", "--train-tokens")
# Required flags that no plan depends on: alternatives, one of which is needed, and a value for the first.
STAND_INS = (
    (("--lr",), "1e-4"),
    (TRAINING_LENGTH, "1"),
    (("--data-path", "--train-data-path"), "none"),
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def token_budget(text: str) -> int:
    """Parse the tokens of a whole training run, such as 1000000000 or 1B; K, M, B and T are powers of ten."""
    match = re.fullmatch(r"([0-9][0-9,_]*(?:\.[0-9]+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    number = float(re.sub("[,_]", "", match[1])) * _UNITS[match[2].upper()] if match else 0.0
    if not 1 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens; give one, such as 10B or 500M")
    return round(number)


def completed(flags: Sequence[str]) -> list[str]:
    """Add stand-ins to the flags of a run for required flags that a plan does not depend on; [] stays []."""
    given = _names(flags)
    missing = [(names[0], value) for names, value in STAND_INS if given.isdisjoint(names)] if flags else []
    return [*flags, *chain.from_iterable(missing)]


def states_training_length(flags: Sequence[str]) -> bool:
    """Return whether the flags of a run say how long it trains."""
    return not _names(flags).isdisjoint(TRAINING_LENGTH)


def _names(flags: Sequence[str]) -> set[str]:
    return {word.split("=")[0] for word in expand_files(flags)}


def plan_of(arguments: argparse.Namespace) -> tuple[Plan, Open]:
    """Return the plan that the command line asks for, and what of it was left open."""
    plan, choices = stated_plan(arguments)
    if not plan.job.streamed:
        return plan, Open()
    return fastest(plan, choices) or (with_free_device_memory(plan) if choices.device_memory else plan), choices


def stated_plan(arguments: argparse.Namespace) -> tuple[Plan, Open]:
    """Return the plan as it is stated, with defaults for what was left open, and what that was."""
    machines = machines_of(arguments)
    flags = arguments.training
    config = with_hugging_face_model(parse_args(flags), arguments.gpus) if flags else None
    job = job_of_model(arguments) if config is None else job_of_config(config, arguments)
    asked = arguments.backend or (config.model.attention_backend if config else "auto")
    backend = machines.gpu.rated(asked)
    if backend is None:
        known = ", ".join(machines.gpu.attention)
        raise ConfigError(f"--backend ({asked}) has no rates for the {machines.gpu.name} here; use one of {known}")
    shared = job.sequence_parallel_size
    if job.num_gpus % shared:
        allowed = [n for n in range(1, job.num_gpus + 1) if job.num_gpus % n == 0]
        raise ConfigError(
            f"--sequence-parallel ({shared}) must divide the {job.num_gpus} GPUs; use one of "
            f"{', '.join(map(str, allowed))}"
        )
    choices = Open.of(config) if config else Open(arguments.chunk_size is None, arguments.device_memory is None)
    return Plan(job, machines, backend), choices


def machines_of(arguments: argparse.Namespace) -> Machines:
    """Return the machines, whose host memory is what a run may use of it."""
    return Machines(
        gpu_of(arguments.gpu, arguments.gpu_memory, arguments.gpu_tflops),
        arguments.gpus,
        arguments.gpus_per_node,
        arguments.host_memory * (1 - HOST_HEADROOM),
        arguments.network,
        link_of(arguments.link),
        arguments.disk_memory or 0,
        disk_of(arguments.disk, arguments.disk_memory, min(arguments.gpus_per_node, arguments.gpus)),
    )


def gpu_of(name: str | None, memory_gib: float | None, tflops: float | None) -> Gpu:
    """Return the GPU of --gpu with the memory given, or one of which memory and peak are given."""
    if tflops is not None:
        if name is not None or memory_gib is None:
            raise ConfigError(
                f"--gpu-tflops ({tflops:g}) describes a GPU without a name, together with --gpu-memory; leave out "
                "--gpu, and give --gpu-memory"
            )
        return gpu_of_data_sheet(memory_gib, tflops)
    gpu = gpu_called(name or DEFAULT_GPU)
    return replace(gpu, memory_gib=memory_gib or gpu.memory_gib)


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


def disk_of(rates: list[float] | None, memory_gib: float | None, num_gpus: int) -> DiskRates:
    """Return each GPU's share of the rates of --disk."""
    read, write = rates or DEFAULT_DISK
    if rates is not None and memory_gib is None:
        raise ConfigError(f"--disk ({read:g} {write:g}) has no effect without --disk-memory; add it")
    return DiskRates(read / num_gpus, write / num_gpus)


def model_called(name: str, seq_length: int) -> tuple[ModelConfig, int]:
    """Return (model, vocabulary size) of a Hugging Face folder or its config.json, or of a name."""
    if Path(name).exists():
        flags = ModelConfig(hf_model=name, num_layers=0, hidden_size=0, num_attention_heads=0, seq_length=seq_length)
        model = read_model(Path(name), flags)
        return model, model.embedding_rows
    if name in MODEL_NAMES:
        return named_model(name, seq_length)
    if content := published_config(name):
        model = model_of_config(content, name, seq_length)
        return model, model.embedding_rows
    raise ConfigError(
        f"--model ({name}) is neither a folder, nor a file, nor one of {', '.join((*MODEL_NAMES, *PUBLISHED_NAMES))}; "
        "give one of them"
    )


def job_of_model(arguments: argparse.Namespace) -> Job:
    """Return the job of --model."""
    model, vocabulary = model_called(arguments.model, arguments.seq_length)
    if arguments.lora_rank is not None:
        if not isinstance(model, HuggingFaceModelConfig):
            raise ConfigError(
                f"--lora-rank ({arguments.lora_rank}) is for Hugging Face models, and --model ({arguments.model}) is "
                f"none; name a folder, a config.json, or one of {', '.join(PUBLISHED_NAMES)}"
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
    """Return the job of the training flags."""
    parallel = config.parallel
    if parallel.ds_sequence_parallel_fpdt and not parallel.ds_sequence_parallel_fpdt_offloading:
        raise ConfigError(
            "runs with --ds-sequence-parallel-fpdt are planned here with --ds-sequence-parallel-fpdt-offloading only; "
            "add it"
        )
    folders = parallel.ds_sequence_parallel_fpdt_disk
    if folders and arguments.disk_memory is None:
        raise ConfigError(
            f"--ds-sequence-parallel-fpdt-disk ({','.join(folders)}) is a disk of unknown size here; add --disk-memory "
            "before --"
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


def variants_of(job: Job) -> list[Variant]:
    """Return other ways to train the model of a job: adapters, where it is a Hugging Face model and trained whole."""
    model = job.model
    if not isinstance(model, HuggingFaceModelConfig) or job.is_frozen:
        return []
    try:
        require_package("peft", "--lora-rank")
    except ConfigError:
        return []
    settings = (AdaptersConfig(lora_rank=LORA_RANK), AdaptersConfig(lora_rank=LORA_RANK, quantize_base="nf4"))
    flags = (f"--lora-rank {LORA_RANK}", f"--lora-rank {LORA_RANK} --quantize-base nf4")
    return [Variant((flag,), with_adapters(model, each)) for flag, each in zip(flags, settings, strict=True)]


def training_of(arguments: argparse.Namespace, plan: Plan, choices: Open) -> Training | None:
    """Return the plan of the whole training run, None where its length is not given."""
    if arguments.train_tokens or arguments.train_samples:
        tokens = arguments.train_tokens or arguments.train_samples * plan.job.model.seq_length
        return Training((Phase(plan, plan.training_steps(tokens)),), tokens)
    if not arguments.training_length_is_given:
        return None
    phases = phases_of_run(parse_args(arguments.training), plan.job.num_gpus)
    lengths = {length for length, _ in phases} - {plan.job.model.seq_length}
    return Training.of(plan, shorter_plans(plan, choices, sorted(lengths, reverse=True)), phases)
