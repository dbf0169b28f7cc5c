"""The lines with which a run introduces itself: what it trains, on what, how, how long, and with which software."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, offloads, zero_stage_run
from megatron.fpdt.memory_model import StreamShape
from megatron.initialize import GIB, Context
from megatron.launch.disk import disk_memory
from megatron.launch.execution import ChosenExecution, attention_kernel
from megatron.logging.progress import format_duration
from megatron.model.builder import Execution
from megatron.model.layers import head_layout
from megatron.planner.job import Job
from megatron.planner.report import chunk_line, execution_lines, fact_line, recompute_line
from megatron.planner.training import Training
from megatron.ranks.world import local_world_size
from megatron.training.lengths import Lengths

PACKAGES = {"torch": "torch", "deepspeed": "DeepSpeed", "transformers": "transformers"}
# Kernels with a package of their own; others come with torch.
KERNEL_PACKAGES = {"flash-attn-2": "flash-attn", "flash-attn-3": "flash-attn-3", "flash-attn-4": "flash-attn-4"}
LARGE_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


@dataclass(frozen=True)
class Introduction:
    """What is known of a run before its checkpoint is chosen."""

    config: Config
    context: Context
    padded_vocab_size: int
    chosen: ChosenExecution
    of_model: Mapping[str, str]
    """More facts about the model, by label: how it was checked, how its experts run."""

    def log(self, lengths: Lengths, state: TrainState) -> None:
        """Log what the run is, on rank 0."""
        config, context, chosen = self.config, self.context, self.chosen
        if not context.is_first_rank:
            return
        title, *how = _execution_lines(chosen, config, context)
        job = Job.of(config, context.parallel_state.world_size, self.padded_vocab_size)
        facts = {
            "model": _model(config, context, job),
            **self.of_model,
            "ranks": _ranks(config, context),
            "batch": _batch(config, lengths),
            "attention": _attention(config, context),
            "software": _software(),
            "link to host": "" if context.link is None else f"{context.link}, per GPU with all GPUs copying at once",
            "disk rates": _disk(config, context, chosen.execution),
        }
        training = {"training": f"to iteration {lengths.iterations}: {lengths.left(state)}", "time": ""}
        if chosen.plan is not None:
            left = Training.of(chosen.plan, chosen.shorter, lengths.phases_left(state))
            training["time"] = "at most " * lengths.samples.is_grouped + _time(left.seconds)
        how += _lines_of_shorter_steps(chosen.execution)
        for line in (title, *_lines(facts), *how, *_lines(training)):
            context.log.info("%s", line)


def _lines(facts: Mapping[str, str]) -> Iterator[str]:
    return (fact_line(label, text) for label, text in facts.items() if text)


def _execution_lines(chosen: ChosenExecution, config: Config, context: Context) -> list[str]:
    """Say how the run executes, under a title."""
    execution, plan, choices, _ = chosen
    if plan is not None:
        return execution_lines(plan, choices)
    num_ranks = context.parallel_state.world_size
    title = f"execution on {num_ranks} {context.device.type.upper()} rank{'s' * (num_ranks > 1)}:"
    if not execution.fpdt:
        saved = "recomputed" if execution.activation_checkpointing else "kept"
        from_host = " from the host" * (execution.activation_checkpointing and execution.checkpoint_in_cpu)
        return [title, fact_line("without FPDT", f"activations {saved}{from_host}")]
    recompute = recompute_line(execution.recompute, execution.checkpoint_interval)
    lines = [title, chunk_line(min(execution.chunk_size, config.model.seq_length)), recompute]
    if execution.offloading:
        lines += _offloaded(execution, config, context)
    return lines


def _offloaded(execution: Execution, config: Config, context: Context) -> Iterator[str]:
    """Say what host and disk store."""
    offloaded, disk = _offloaded_bytes(execution, config, context), execution.disk
    if disk is None or execution.host_memory_bytes is None:
        yield fact_line("host memory", f"{offloaded / GIB:.3f} GiB", "of activations per rank")
        return
    on_host = execution.host_memory_bytes
    staging, on_disk = disk.staging_bytes / GIB, (offloaded - on_host) / GIB
    staged = f"of activations per rank, and {staging:.3f} of staging memory"
    yield fact_line("host memory", f"{on_host / GIB:.3f} GiB", staged)
    yield fact_line("disk", f"{on_disk:.3f} GiB", "of activations per rank")


def _lines_of_shorter_steps(execution: Execution) -> Iterator[str]:
    """Say what steps below --seq-length save, and keep on the GPU."""
    for length, saving in execution.by_length.items():
        gib, interval = saving.device_budget.total_bytes / GIB, saving.checkpoint_interval
        recompute = f"recompute {saving.recompute}, checkpoint interval {interval}"
        yield fact_line(f"at {length:,}", f"up to {gib:.3g} GiB of chunks on the GPU, {recompute}")


def _offloaded_bytes(execution: Execution, config: Config, context: Context) -> int:
    size, batch = config.parallel.ds_sequence_parallel_size, config.training.micro_batch_size
    shape = StreamShape.of(config.model, execution.chunk_size, size, batch, context.dtype.itemsize)
    return shape.host_bytes(execution.device_budget.total_bytes, execution.checkpoint_interval, execution.recompute)


def _model(config: Config, context: Context, job: Job) -> str:
    model, trained, total = config.model, job.trained_parameters, job.num_parameters
    name = f"{model.hf_model}, " if model.hf_model else ""
    parameters = f"{_count(total)} parameters"
    if trained < total:
        parameters = f"{_count(total - trained)} parameters frozen, {_count(trained)} trained"
    dtype = str(context.dtype).removeprefix("torch.")
    return (
        f"{name}{parameters}, {dtype}: {model.num_layers} layers of {model.hidden_size:,}, {model.num_attention_heads} "
        f"query and {model.num_key_value_heads} key/value heads of {model.kv_channels}"
    )


def _ranks(config: Config, context: Context) -> str:
    parallel = context.parallel_state
    num_machines = -(-parallel.world_size // local_world_size())
    machines = "1 machine" if num_machines == 1 else f"{num_machines} machines"
    size = parallel.sequence_parallel_size
    on_host = ", optimizer on the host" * offloads(config, "offload_optimizer")
    return (
        f"sequence parallel {size} x data parallel {parallel.world_size // size} on {machines}, "
        f"ZeRO-{zero_stage_run(config)}{on_host}"
    )


def _disk(config: Config, context: Context, execution: Execution) -> str:
    """Say how fast the disk for chunks is, and whether it is used; "" without one."""
    if context.disk_rates is None:
        return ""
    unused = "; not used: the host has room for all chunks" * (execution.disk is None)
    gib = disk_memory(config, context) / GIB
    return f"{context.disk_rates}, with all ranks at work; {gib:.4g} GiB may be used per rank{unused}"


def _batch(config: Config, lengths: Lengths) -> str:
    length, batch = config.model.seq_length, lengths.global_batch_size
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    accumulated = f", {lengths.num_microbatches} micro-batches on each rank" * (lengths.num_microbatches > 1)
    up_to = "up to " * lengths.samples.vary
    return f"{up_to}{batch * length:,} tokens: {sequences} of {up_to}{length:,}{accumulated}"


def _attention(config: Config, context: Context) -> str:
    kernel = attention_kernel(config, context)
    heads = head_layout(config.model, config.parallel.ds_sequence_parallel_size)
    uneven = f"; {heads}" * bool(heads.num_heads % heads.num_ranks)
    return f"{kernel} {_kernel_version(kernel)}".rstrip() + uneven


def _kernel_version(kernel: str) -> str:
    """Return the version of an attention kernel; "" for one that is part of torch."""
    if kernel == "cudnn":
        return str(torch.backends.cudnn.version())
    return _version(KERNEL_PACKAGES.get(kernel, ""))


def _software() -> str:
    versions = {name: _version(package) for package, name in PACKAGES.items()}
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


def _version(package: str) -> str:
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return ""


def _time(seconds: float) -> str:
    end = datetime.now().astimezone() + timedelta(seconds=seconds)
    return f"about {format_duration(seconds)}, until {end:%a %d %b %Y, %H:%M}, without evaluation and saving"


def _count(number: int) -> str:
    """Return a count with three digits and its unit."""
    unit, suffix = next(((unit, suffix) for unit, suffix in LARGE_COUNTS if number >= unit), (1.0, ""))
    return f"{number / unit:.3g}{suffix}"
