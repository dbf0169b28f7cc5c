#!/usr/bin/env python3
"""Measure whole optimizer steps: the cost of embedding, loss, optimizer and ZeRO on top of the blocks.

    python benchmarks/training_step.py
    deepspeed --num_gpus 2 benchmarks/training_step.py      the same sequence shared by two GPUs
    python benchmarks/training_step.py --as-one-of 4        simulates one rank of four that share it, without a network

Runs optimizer steps of a LLaMA on random tokens, through the training path itself: the flags of pretrain_gpt.py, its
model, engine and optimizer. On one GPU it first measures one streamed block of the same geometry, length, chunk, kernel
and offloading in the same process. On several GPUs all of them share the sequence (Ulysses), and the rates are per GPU;
"tokens/s" is over all GPUs, and memory is the first one's. With --as-one-of a single GPU stores, computes and copies as
much as one of several would, and collectives are copies on that GPU (benchmarks/loopback.py): the network time is
missing, and one of the last lines reports the bytes that the network would carry.

    x block = (model FLOPs of a step / its seconds) / (model FLOPs of a block / its seconds)

The default is 6 layers of Llama-3.2-3B's widths with its vocabulary: 1.4B parameters. "outside blocks" is the step time
minus the time of all the model's blocks. "x block" can exceed 1, as the head's matmuls run faster than attention. "as
planned" is the planner's estimate (docs/planner.md) of the same step. The last lines report the host pool: "allocated
over needed" is the memory that it allocated from the machine over the peak in use. After the first step it must
allocate nothing (else exit code 1).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from benchmarks.block import Build, ModelBlock, Way, automatic_recompute, measure
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
    free_memory,
    geometry_of,
    gib,
    parse,
    peak_bytes,
    peak_process_bytes,
    reserved_bytes,
    reset_peak,
    run_script,
    spread,
    wall_seconds,
)
from benchmarks.loopback import LoopbackGroup, init_loopback
from benchmarks.run_flags import add_run_flags, as_flags, check_run_flags, num_gpus_of, run_flags
from megatron.arguments import parse_args
from megatron.config import Config, ConfigError, ModelConfig, Recompute, deepspeed_config, validate
from megatron.data.batch import Sample, slice_batch
from megatron.fpdt.stream import Stream
from megatron.initialize import Context, initialize
from megatron.launch.determinism import use_deterministic_kernels
from megatron.launch.execution import plan_execution, plan_of
from megatron.launch.link import with_measured_link
from megatron.logging.device_peak import peak_tflops
from megatron.model.builder import build_model
from megatron.model.initialization import Initialization
from megatron.model.transformer import LanguageModelHead, TokenEmbedding, TransformerLayer
from megatron.optimizer.param_groups import parameter_groups
from megatron.planner.flops import model_flops
from megatron.planner.hardware import GIB, GPUS, gpu_like
from megatron.planner.memory import OUTSIDE_TORCH
from megatron.planner.plan import Plan
from megatron.ranks.world import World

NAME = "training_step"
COLUMNS = (
    Column("what", "what", width=14),
    Column("seconds", "seconds", ".3f"),
    Column("tokens_per_second", "tokens/s", ".0f"),
    Column("tokens_per_second_per_gpu", "tokens/s/GPU", ".0f"),
    Column("model_tflops", "model TFLOP/s", ".0f"),
    Column("times_matmul", "x matmul", ".3f"),
    Column("mfu", "MFU", ".1%"),
    Column("times_block", "x block", ".3f"),
    Column("spread", "spread", ".1%"),
    Column("outside_blocks_seconds", "outside blocks s", ".3f"),
    Column("peak_gib", "peak GPU GiB", ".2f"),
    Column("host_used_gib", "host needed GiB", ".2f"),
    Column("host_allocated_gib", "host allocated GiB", ".2f"),
    Column("process_gib", "process GiB", ".2f"),
    Column("loss", "loss", ".3f"),
)
DEFAULT = Geometry(hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24)
QUICK = {"num_layers": 4, "seq_length": 131072}
TINY = {**TINY_GEOMETRY, "num_layers": 2, "vocab_size": 256, "seq_length": 128, "chunk": 48}


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    prepare: Callable[[ModelConfig, torch.dtype], Build]
    """Do what comes before DeepSpeed partitions parameters; return the rest of the construction, which runs once."""

    leaf_modules: Sequence[type[nn.Module]]

    load: Callable[[Any, Config], None] | None = None
    """Load weights into the engine of a run, where `prepare` leaves them open."""


NATIVE = Kind(lambda model, dtype: build_model, (TokenEmbedding, TransformerLayer, LanguageModelHead))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--num-layers", type=int, default=6, help="[%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=128256, help="[%(default)s]")
    add_run_flags(parser)
    add_geometry_flags(parser, DEFAULT)
    arguments = parse(parser, argv, QUICK, TINY)
    check_run_flags(parser, arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config = parse_args(training_flags(arguments, num_gpus_of(arguments)))
    block = geometry_of(arguments).model_config(arguments.seq_length, arguments.backend)
    return measure_run(arguments, config, block, NATIVE, NAME)


def measure_run(arguments: argparse.Namespace, config: Config, block_model: ModelConfig, kind: Kind, name: str) -> int:
    """Measure the block and the steps of a run, and report them as benchmark `name`; return the exit code."""
    rank, num_gpus = World.from_environment().rank, num_gpus_of(arguments)
    if arguments.as_one_of:
        init_loopback(num_gpus)
    validate(config, num_gpus, arguments.device)
    if config.training.deterministic_mode:
        use_deterministic_kernels(arguments.device)
    if rank:
        measure_steps(config, arguments, num_gpus, kind)
        torch.distributed.destroy_process_group()
        return 0
    report = Report(name, arguments, COLUMNS)
    with_block = num_gpus == 1 and not arguments.step_only and not arguments.plain
    block = measure_block(arguments, config.model, block_model, kind, report) if with_block else None
    if block is not None:
        report.add(block)
        free_memory(report.device)  # the block's model, which the preflight of the steps would count as used
        if "failed" in block:
            return 1
    step = attempt(lambda: measure_steps(config, arguments, num_gpus, kind), report.device)
    torch.distributed.destroy_process_group()
    step |= {"what": name_of_run(arguments, num_gpus)}
    if "failed" in step:
        report.add(step)
        return 1
    peak = peak_tflops(report.header["device"])
    step |= rates(step, num_gpus, report.matmul, peak)
    report.add(step | (against_block(step, block, config.model.num_layers) if block else {}))
    if not arguments.on_device:
        planned = planned_row(plan_of_step(config, arguments, step, num_gpus, report.device))
        report.add(planned | rates(planned, num_gpus, report.matmul, peak))
    report.finish()
    draw(report)
    if arguments.gpu_memory_limit is not None:
        print(f"GPU memory of torch: {step['reserved_gib']:.2f} GiB reserved, of {arguments.gpu_memory_limit:g} GiB "
              f"less {gib(OUTSIDE_TORCH):g} for what is not torch's")  # fmt: skip
    if not step["host_used_gib"]:
        return 0
    ratio, later = step["host_allocated_gib"] / step["host_used_gib"], step["host_bytes_after_first_step"]
    print(f"host memory allocated over needed: {ratio:.4f}")
    if arguments.as_one_of:
        print(f"received from other GPUs in a step, which took no time: {step['received_gib']:.3g} GiB")
    if later is None:  # no step has followed
        return 0
    print(f"host bytes allocated after the first step: {later} (must be 0)")
    return 1 if later else 0


def name_of_run(arguments: argparse.Namespace, num_gpus: int) -> str:
    """Name the row of the steps."""
    if arguments.as_one_of:
        return f"one of {num_gpus} GPUs"
    return "optimizer step" if num_gpus == 1 else f"on {num_gpus} GPUs"


def training_flags(arguments: argparse.Namespace, num_gpus: int = 1) -> list[str]:
    """Return the flags for pretrain_gpt.py."""
    widths = {name: getattr(arguments, name) for name in vars(DEFAULT)}
    values = {"num_layers": arguments.num_layers, **widths, "rotary_position_embeddings_theta": 500000,
              "normalization": "rmsnorm"}  # fmt: skip
    switches = ["use_rotary_position_embeddings", "swiglu", "disable_bias_linear",
                "untie_embeddings_and_output_weights"]  # fmt: skip
    return [*as_flags(values, switches), *run_flags(arguments, num_gpus)]


def measure_block(
    arguments: argparse.Namespace, model: ModelConfig, block_model: ModelConfig, kind: Kind, report: Report
) -> Row:
    """Measure the row of one block; its seconds are those of forward plus backward."""
    way = Way("block", streamed=True, offloading=not arguments.on_device)
    automatic = automatic_recompute(model, arguments.chunk, report.device) if way.offloading else Recompute.ALL
    execution = way.execution(arguments.chunk, arguments.recompute or automatic)
    build_model = kind.prepare(block_model, compute_dtype(report.device))
    build = partial(ModelBlock, block_model, execution, report.device, build=build_model)
    return {"what": "one block"} | measure(build, report.device, report.matmul, repeats=max(arguments.steps, 2))


def measure_steps(config: Config, arguments: argparse.Namespace, num_gpus: int, kind: Kind = NATIVE) -> Row:
    """Time steps as in the training loop: batch, forward, backward, optimizer. Collective over all ranks."""
    from megatron.engine.engine import Engine, whole_parameters  # imports DeepSpeed, which takes a while

    context = with_limits(with_measured_link(config, initialize(config)), arguments)
    model, device, parallel_state = config.model, context.device, context.parallel_state
    vocabulary = model.num_rows(arguments.vocab_size)
    execution = replace(plan_execution(config, context, vocabulary).execution, whole_parameters=whole_parameters)
    build = kind.prepare(model, context.dtype)
    engine = Engine(
        partial(build, model, vocabulary, parallel_state, execution, Initialization(context.dtype, device)),
        kind.leaf_modules,
        lambda module: parameter_groups(module, config.optimizer.weight_decay),
        config.optimizer,
        deepspeed_config(config, num_gpus),
        device,
    )
    if kind.load is not None:
        kind.load(engine, config)
    stream: Stream = engine.module.execution.stream  # type: ignore[assignment, union-attr]
    pool = stream.store.pool
    random = np.random.default_rng(1)
    losses: list[torch.Tensor] = []
    num_tokens = torch.tensor(float(model.seq_length), device=device)

    def step(length: int = model.seq_length) -> None:
        layout = stream.layout_of(length)
        samples = [Sample(random.integers(0, arguments.vocab_size, length + 1))]
        batch = slice_batch(samples, layout, parallel_state.sequence_parallel_rank, pin=device.type == "cuda")
        losses.append(engine.train_step([batch.inputs()], num_tokens, config.optimizer.lr))

    if not arguments.no_warm_up:
        step(min(2 * execution.chunk_size, model.seq_length) if arguments.short_warm_up else model.seq_length)
        gradient_norm = engine.gradient_norm()
    is_warm = not (arguments.no_warm_up or arguments.short_warm_up)
    reset_peak(device)
    received = LoopbackGroup.received_bytes
    seconds, host_bytes = [], [pool.allocated_bytes] if is_warm else []
    for _ in range(arguments.steps):
        seconds.append(wall_seconds(step, device))
        host_bytes.append(pool.allocated_bytes)
    received = LoopbackGroup.received_bytes - received
    peak, reserved = peak_bytes(device), reserved_bytes(device)
    reported = torch.stack([losses[0], losses[-1]])
    torch.distributed.all_reduce(reported)
    first_loss, loss = (reported / num_tokens).tolist()
    return {
        "seq_length": model.seq_length, "seconds": statistics.median(seconds), "spread": spread(seconds),
        "model_flops": model_flops(model, vocabulary, model.seq_length),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "peak_gib": gib(peak), "reserved_gib": gib(reserved),
        "resting_gib": gib(allocated_bytes(device)), "process_gib": gib(peak_process_bytes()),
        "attention_backend": stream.attention.name, "recompute_run": execution.recompute,
        "streamed": execution.fpdt, "chunk_run": execution.chunk_size if execution.fpdt else None,
        "device_memory_run": gib(execution.device_budget.total_bytes),
        "checkpoint_interval": execution.checkpoint_interval, "zero_stage": arguments.zero_stage,
        "loss": loss,
        # Of the first step, where the weights are still the initial ones.
        **({"first_loss": first_loss, "first_gradient_norm": gradient_norm} if is_warm else {}),
        "host_used_gib": gib(pool.peak_used_bytes), "host_allocated_gib": gib(pool.allocated_bytes),
        "host_bytes_after_first_step": host_bytes[-1] - host_bytes[0] if len(host_bytes) > 1 else None,
        "received_gib": gib(received) / arguments.steps,
    }  # fmt: skip


def with_limits(context: Context, arguments: argparse.Namespace) -> Context:
    """Return the context of a machine with as little memory as flags say; torch then allocates no more on the GPU.

    ConfigError for a limit of the GPU on a CPU.
    """
    host, gpu = arguments.host_memory_limit, arguments.gpu_memory_limit
    if host is not None:
        context = replace(context, host_memory_bytes=min(context.host_memory_bytes, int(host * GIB)))
    if gpu is not None:
        if context.device.type != "cuda":
            raise ConfigError(f"--gpu-memory-limit ({gpu:g}) limits a GPU, and this runs on a CPU; leave it out")
        allocated = (gpu * GIB - OUTSIDE_TORCH) / torch.cuda.get_device_properties(context.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(allocated, 1.0), context.device)
        context = replace(context, device_memory_bytes=min(context.device_memory_bytes, int(gpu * GIB)))
    return context


def plan_of_step(config: Config, arguments: argparse.Namespace, step: Row, num_gpus: int, device: torch.device) -> Plan:
    """Plan the step that was measured; on a CPU the times are those of some GPU."""
    vocabulary = config.model.num_rows(arguments.vocab_size)
    gpu, backend = GPUS["H200"], "flash-attn-4"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu, backend = gpu_like(properties.name, properties.total_memory), step["attention_backend"]
    plan = plan_of(config, num_gpus, gpu, 0, vocabulary, backend)  # no host memory: it chooses nothing here
    if arguments.as_one_of:
        alone = replace(gpu, peer_gbps=gpu.memory_gbps / 2)  # a collective is a copy on the GPU: it reads and writes
        machines = replace(plan.machines, gpu=alone, gpus_per_node=num_gpus, measured_link=gpu.link(1))
        plan = replace(plan, machines=machines)
    run = {"recompute": step["recompute_run"], "checkpoint_interval": step["checkpoint_interval"],
           "streamed": step["streamed"], "chunk_length": step["chunk_run"] or config.model.seq_length,
           "device_memory_bytes": int(step["device_memory_run"] * GIB)}  # fmt: skip
    return plan.with_job(replace(plan.job, **run))


def planned_row(plan: Plan) -> Row:
    """Return the planner's estimates for the columns that it covers."""
    memory, speed = plan.memory, plan.speed
    return {
        "what": "as planned", "seq_length": plan.job.model.seq_length, "seconds": speed.step,
        "model_flops": speed.model_flops, "outside_blocks_seconds": speed.step - speed.forward - speed.backward,
        "peak_gib": gib(memory.gpu), "resting_gib": gib(memory.states), "host_used_gib": gib(memory.host_chunks),
        "process_gib": gib(memory.host),
    }  # fmt: skip


def rates(step: Row, num_gpus: int, matmul: float, peak: float | None) -> Row:
    """Return tokens per second over all GPUs, model FLOP/s per GPU, and its ratios to the matmul and the peak."""
    rate = step["model_flops"] / step["seconds"] / num_gpus / 1e12
    return {
        "tokens_per_second": step["seq_length"] / step["seconds"],
        "tokens_per_second_per_gpu": step["seq_length"] / step["seconds"] / num_gpus,
        "model_tflops": rate,
        "times_matmul": rate / matmul,
        "mfu": rate / peak if peak else None,
    }


def against_block(step: Row, block: Row, num_layers: int) -> Row:
    """Return the ratio of the step's rate to the block's, and the time outside the blocks."""
    return {
        "times_block": step["model_tflops"] / block["model_tflops"],
        "outside_blocks_seconds": step["seconds"] - num_layers * block["seconds"],
    }


def draw(report: Report) -> None:
    """Plot the rates of a block and of the whole step."""
    with report.picture(1) as (panel,):
        bars = panel.bar([row["what"] for row in report.rows], [row["times_matmul"] for row in report.rows])
        panel.bar_label(bars, fmt="%.3f")
        panel.set(ylabel="model FLOP/s, x matmul")
        panel.margins(y=0.15)


if __name__ == "__main__":
    sys.exit(run_script(main))
