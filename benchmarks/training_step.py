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
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.block import ModelBlock, Way, automatic_recompute, measure
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
from megatron.arguments import parse_args
from megatron.config import Config, Recompute, deepspeed_config, validate
from megatron.data.batch import Sample, slice_batch
from megatron.fpdt.stream import Stream
from megatron.initialize import initialize
from megatron.launch.determinism import use_deterministic_kernels
from megatron.launch.execution import choose_execution, plan_of
from megatron.launch.link import with_measured_link
from megatron.logging.device_peak import peak_tflops
from megatron.model.builder import build_model
from megatron.model.initialization import Initialization
from megatron.model.transformer import LanguageModelHead, TokenEmbedding, TransformerLayer
from megatron.optimizer.param_groups import parameter_groups
from megatron.planner.flops import model_flops
from megatron.planner.hardware import GIB, GPUS, gpu_like
from megatron.planner.plan import Plan
from megatron.ranks.world import World
from megatron.tokenizer import pad_vocab_size

NAME = "training_step"
COLUMNS = (
    Column("what", "what", width=14),
    Column("seconds", "seconds", ".3f"),
    Column("tokens_per_second", "tokens/s", ".0f"),
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
PLAIN = {"kept": [], "recomputed": ["checkpoint_activations"],
         "on-host": ["checkpoint_activations", "checkpoint_in_cpu"]}  # fmt: skip
QUICK = {"num_layers": 4, "seq_length": 131072}
TINY = {**TINY_GEOMETRY, "num_layers": 2, "vocab_size": 256, "seq_length": 128, "chunk": 48}


def chunk_size(text: str) -> int:
    """Parse a number of tokens; 0 for auto."""
    return 0 if text == "auto" else int(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser(NAME, str(__doc__))
    parser.add_argument("--num-layers", type=int, default=6, help="[%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=128256, help="[%(default)s]")
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
    parser.add_argument(
        "--as-one-of", type=int, metavar="GPUS", help="simulate one of so many ranks that share a sequence"
    )
    parser.add_argument("--step-only", action="store_true", help="without the block")
    parser.add_argument("--deterministic-mode", action="store_true", help="deterministic kernels only")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    add_geometry_flags(parser, DEFAULT)
    arguments = parse(parser, argv, QUICK, TINY)
    if not (arguments.chunk or arguments.step_only):
        parser.error("--chunk auto plans a step, not a block; add --step-only")
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    num_processes = World.from_environment().size
    if arguments.as_one_of is not None and (arguments.as_one_of < 2 or num_processes > 1):
        parser.error(
            f"--as-one-of ({arguments.as_one_of}) plays 2 or more GPUs in a single process, not in {num_processes}; "
            "leave it out for one GPU, or the launcher"
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    world = World.from_environment()
    rank, num_gpus = world.rank, world.size
    if arguments.as_one_of:
        num_gpus = arguments.as_one_of
        init_loopback(num_gpus)
    config = parse_args(training_flags(arguments, num_gpus))
    validate(config, num_gpus, arguments.device)
    if config.training.deterministic_mode:
        use_deterministic_kernels(arguments.device)
    if rank:
        measure_steps(config, arguments, num_gpus)
        torch.distributed.destroy_process_group()
        return 0
    report = Report(NAME, arguments, COLUMNS)
    with_block = num_gpus == 1 and not arguments.step_only and not arguments.plain
    block = measure_block(arguments, report) if with_block else None
    if block is not None:
        report.add(block)
        if "failed" in block:
            return 1
    step = attempt(lambda: measure_steps(config, arguments, num_gpus), report.device)
    torch.distributed.destroy_process_group()
    step |= {"what": name_of_run(arguments, num_gpus)}
    if "failed" in step:
        report.add(step)
        return 1
    peak = peak_tflops(report.header["device"])
    step |= rates(step, num_gpus, report.matmul, peak)
    report.add(step | (against_block(step, block, arguments.num_layers) if block else {}))
    if not arguments.on_device:
        planned = planned_row(plan_of_step(config, arguments, step, num_gpus, report.device))
        report.add(planned | rates(planned, num_gpus, report.matmul, peak))
    report.finish()
    draw(report)
    if not step["host_used_gib"]:
        return 0
    ratio, later = step["host_allocated_gib"] / step["host_used_gib"], step["host_bytes_after_first_step"]
    print(f"host memory allocated over needed: {ratio:.4f}")
    if arguments.as_one_of:
        print(f"received from other GPUs in a step, which took no time: {step['received_gib']:.3g} GiB")
    print(f"host bytes allocated after the first step: {later} (must be 0)")
    return 1 if later else 0


def name_of_run(arguments: argparse.Namespace, num_gpus: int) -> str:
    """Name the row of the steps."""
    if arguments.as_one_of:
        return f"one of {num_gpus} GPUs"
    return "optimizer step" if num_gpus == 1 else f"on {num_gpus} GPUs"


def training_flags(arguments: argparse.Namespace, num_gpus: int = 1) -> list[str]:
    """Return the flags for pretrain_gpt.py. Tokens are random, so --data-path names no real dataset."""
    widths = {name: getattr(arguments, name) for name in vars(DEFAULT)}
    values = {
        "num_layers": arguments.num_layers, **widths, "seq_length": arguments.seq_length,
        "rotary_position_embeddings_theta": 500000, "normalization": "rmsnorm", "lr": 1e-4,
        "attention_backend": arguments.backend, "zero_stage": arguments.zero_stage,
        "train_iters": arguments.steps + 1, "eval_iters": 0, "data_path": "random",
        "tokenizer_type": "NullTokenizer", "vocab_size": arguments.vocab_size, "ds_sequence_parallel_size": num_gpus,
    }  # fmt: skip
    switches = ["use_rotary_position_embeddings", "swiglu", "disable_bias_linear",
                "untie_embeddings_and_output_weights"]  # fmt: skip
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
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *(f"--{name.replace('_', '-')}" for name in switches)]


def measure_block(arguments: argparse.Namespace, report: Report) -> Row:
    """Measure the row of one block; its seconds are those of forward plus backward."""
    way, geometry = Way("block", streamed=True, offloading=not arguments.on_device), geometry_of(arguments)
    model = geometry.model_config(arguments.seq_length, arguments.backend, arguments.num_layers)
    automatic = automatic_recompute(model, arguments.chunk, report.device) if way.offloading else Recompute.ALL
    execution = way.execution(arguments.chunk, arguments.recompute or automatic)
    config = geometry.model_config(arguments.seq_length, arguments.backend)
    build = partial(ModelBlock, config, execution, report.device)
    return {"what": "one block"} | measure(build, report.device, report.matmul, repeats=max(arguments.steps, 2))


def measure_steps(config: Config, arguments: argparse.Namespace, num_gpus: int) -> Row:
    """Time steps as in the training loop: batch, forward, backward, optimizer. Collective over all ranks."""
    from megatron.engine.engine import Engine, whole_parameters  # imports DeepSpeed, which takes a while

    context = with_measured_link(config, initialize(config))
    model, device, parallel_state = config.model, context.device, context.parallel_state
    vocabulary = pad_vocab_size(arguments.vocab_size, model.make_vocab_size_divisible_by)
    execution = replace(choose_execution(config, context, vocabulary), whole_parameters=whole_parameters)
    engine = Engine(
        partial(build_model, model, vocabulary, parallel_state, execution, Initialization(context.dtype, device)),
        [TokenEmbedding, TransformerLayer, LanguageModelHead],
        lambda module: parameter_groups(module, config.optimizer.weight_decay),
        config.optimizer,
        deepspeed_config(config, num_gpus),
        device,
    )
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

    step(min(2 * execution.chunk_size, model.seq_length) if arguments.short_warm_up else model.seq_length)
    gradient_norm = engine.gradient_norm()
    reset_peak(device)
    received = LoopbackGroup.received_bytes
    seconds, host_bytes = [], [] if arguments.short_warm_up else [pool.allocated_bytes]
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
        **({} if arguments.short_warm_up else {"first_loss": first_loss, "first_gradient_norm": gradient_norm}),
        "host_used_gib": gib(pool.peak_used_bytes), "host_allocated_gib": gib(pool.allocated_bytes),
        "host_bytes_after_first_step": host_bytes[-1] - host_bytes[0],
        "received_gib": gib(received) / arguments.steps,
    }  # fmt: skip


def plan_of_step(config: Config, arguments: argparse.Namespace, step: Row, num_gpus: int, device: torch.device) -> Plan:
    """Plan the step that was measured; on a CPU the times are those of some GPU."""
    vocabulary = pad_vocab_size(arguments.vocab_size, config.model.make_vocab_size_divisible_by)
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
