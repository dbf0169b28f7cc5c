"""Choice of how to execute the model, from the configuration and the memory of the machine."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
import torch.distributed as dist

from megatron.config import Config, ConfigError, Recompute, offloads
from megatron.config.parallel import ParallelConfig
from megatron.fpdt.memory_model import StreamShape, choose_saved_activations, least_bytes, longest_sequence
from megatron.initialize import Context
from megatron.model.builder import Execution
from megatron.model.layers import attention_request
from megatron.ops.attention import choose_backend
from megatron.planner.hardware import GIB, Gpu, Machines, gpu_like
from megatron.planner.job import HALF, Job
from megatron.planner.memory import ACCURACY
from megatron.planner.plan import Plan
from megatron.ranks.world import local_world_size

# Share of the host memory free at the start: page tables, other processes, and what torch pins for its own copies.
_HOST_HEADROOM = 0.03


def choose_execution(config: Config, context: Context, padded_vocab_size: int) -> Execution:
    """Return what the flags say; choose what they leave open by the memory available. Collective over all ranks.

    Raises:
        ConfigError: the run does not fit host memory or, as far as the planner can tell, GPU memory.
    """
    parallel, deepspeed = config.parallel, config.deepspeed
    device_memory = int(parallel.ds_sequence_parallel_fpdt_device_memory * GIB)
    asked = parallel.ds_sequence_parallel_fpdt_host_memory
    host_memory = int(context.host_memory_bytes * (1 - _HOST_HEADROOM))
    plan = _plan(config, context, padded_vocab_size, host_memory)
    non_chunk_bytes = 0 if plan is None else plan.memory.host_states + plan.memory.host_process
    if asked is None:
        host_memory = max(host_memory - non_chunk_bytes, 0)
    else:
        host_memory = int(asked * GIB)
        plan = _plan(config, context, padded_vocab_size, host_memory + non_chunk_bytes)
    chunk_size: int = parallel.ds_sequence_parallel_fpdt_chunk_size
    if not chunk_size:
        chunk_size = _automatic_chunk(plan, context)
        context.log.info("chunk size: %d tokens", chunk_size)
    interval = parallel.ds_sequence_parallel_fpdt_checkpoint_interval
    recompute = parallel.ds_sequence_parallel_fpdt_recompute
    if parallel.ds_sequence_parallel_fpdt_offloading:
        size, batch = parallel.ds_sequence_parallel_size, config.training.micro_batch_size
        shape = StreamShape.of(config.model, chunk_size, size, batch, context.dtype.itemsize)
        recompute, interval = choose_saved_activations(
            shape, shape.sure_budget(host_memory, device_memory), recompute, interval
        )
        needed = shape.tier_bytes(interval, recompute)
        _check_host_memory(shape, needed, host_memory, device_memory, asked is None)
    if plan is not None:
        job = replace(plan.job, chunk_length=chunk_size, recompute=recompute, checkpoint_interval=interval)
        check_gpu_memory(plan.with_job(job))
    return Execution(
        fpdt=parallel.ds_sequence_parallel_fpdt,
        chunk_size=chunk_size,
        offloading=parallel.ds_sequence_parallel_fpdt_offloading,
        device_memory_bytes=device_memory,
        host_memory_bytes=host_memory,
        checkpoint_interval=interval or 1,
        recompute=recompute or Recompute.ALL,
        activation_checkpointing=deepspeed.deepspeed_activation_checkpointing,
        checkpoint_in_cpu=deepspeed.checkpoint_in_cpu,
        documents=config.data.reset_attention_mask,
    )


def _plan(config: Config, context: Context, padded_vocab_size: int, host_memory: int) -> Plan | None:
    """Plan a run with FPDT, to choose its chunk and refuse what does not fit; None for other runs."""
    if not config.parallel.ds_sequence_parallel_fpdt:
        return None
    return plan_of_run(config, context, padded_vocab_size, host_memory)


def plan_of_run(config: Config, context: Context, padded_vocab_size: int, host_memory: int) -> Plan | None:
    """Plan the run on the smallest GPU; None where the planner does not cover such a run."""
    model, parallel = config.model, config.parallel
    on_gpu_alone = parallel.ds_sequence_parallel_fpdt and not parallel.ds_sequence_parallel_fpdt_offloading
    in_half = context.dtype.itemsize == HALF
    if context.device.type != "cuda" or on_gpu_alone or not in_half or offloads(config, "offload_param"):
        return None
    gpu = gpu_like(torch.cuda.get_device_name(context.device), context.device_memory_bytes)
    request = attention_request(model, context.device, context.dtype)
    kernel = choose_backend(model.attention_backend, request, config.data.reset_attention_mask)
    return plan_of(config, context.parallel_state.world_size, gpu, host_memory, padded_vocab_size, kernel.name)


def plan_of(
    config: Config, num_gpus: int, gpu: Gpu, host_memory: int, padded_vocab_size: int, backend: str = "auto"
) -> Plan:
    """Plan a run on `num_gpus` GPUs with `host_memory` bytes each; a kernel without rates counts as `auto`."""
    per_node = min(local_world_size(), num_gpus)
    machines = Machines(gpu, num_gpus, per_node, host_memory * per_node / GIB)
    return Plan(Job.of(config, num_gpus, padded_vocab_size), machines, gpu.rated(backend) or gpu.fastest)


def _automatic_chunk(plan: Plan | None, context: Context) -> int:
    """Choose the fastest chunk that fits every GPU; the flag's default where there is no plan."""
    if plan is None:
        return ParallelConfig.ds_sequence_parallel_fpdt_chunk_size
    agreed = torch.tensor(fastest_chunk(plan), device=context.device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)  # ranks with other GPUs have chosen other chunks
    return int(agreed)


def fastest_chunk(plan: Plan) -> int:
    """Return the planner's fastest chunk, in tokens; ConfigError where none fits."""
    chunk = plan.fastest_chunk()
    if chunk is None:
        host = plan.machines.host_bytes_per_gpu / GIB
        raise ConfigError(
            f"no chunk of --seq-length ({plan.job.model.seq_length}) fits {plan.job.num_gpus} GPUs of "
            f"{plan.machines.gpu.memory_gib:.1f} GiB with {host:.3g} GiB of host memory each; "
            f"{'; '.join(plan.advice())}"
        )
    return chunk


def check_gpu_memory(plan: Plan) -> None:
    """Raise ConfigError if the tensors need more than the GPU has, even with the planner's error allowed for."""
    needed, memory = plan.memory, plan.machines.gpu.memory_gib
    if needed.gpu * (1 - ACCURACY) > memory * GIB:
        raise ConfigError(
            f"the run needs about {needed.gpu / GIB:.0f} GiB of GPU memory per rank, {needed.states / GIB:.0f} of "
            f"it for the model, and the smallest GPU has {memory:.1f} GiB; {'; '.join(plan.advice())}"
        )


def _check_host_memory(
    shape: StreamShape, needed: int, host_memory: int, device_memory: int, is_free_memory: bool
) -> None:
    budget = shape.sure_budget(host_memory, device_memory)
    if needed <= budget:
        return
    longest, least = longest_sequence(shape, budget), least_bytes(shape)
    if least <= budget:
        advice = (
            "leave out --ds-sequence-parallel-fpdt-recompute and --ds-sequence-parallel-fpdt-checkpoint-interval, so "
            "that they are chosen to fit"
        )
    else:
        shorter = f"use --seq-length {longest} or less, " if longest else ""
        size = shape.layout.sequence_parallel_size
        on_device = least - host_memory + shape.largest_bytes
        budgets = f"--ds-sequence-parallel-fpdt-device-memory to {_gib_up(on_device)}"
        if not is_free_memory:
            on_host = host_memory + least - budget
            budgets += f", or --ds-sequence-parallel-fpdt-host-memory to {_gib_up(on_host)}"
        advice = (
            f"{shorter}raise --ds-sequence-parallel-size ({size}), or {budgets}, or see tools/plan_context.py for what "
            "would fit"
        )
    whose = "are free for a rank here" if is_free_memory else "may be used (--ds-sequence-parallel-fpdt-host-memory)"
    raise ConfigError(
        f"the chunks of --seq-length ({shape.layout.sequence_length}) take up {needed / GIB:.4g} GiB of memory per "
        f"rank, and {budget / GIB:.4g} GiB {whose}; {advice}"
    )


def _gib_up(num_bytes: int) -> str:
    """Round up to a tenth of a GiB, so that a budget of this size is enough."""
    return f"{ceil(num_bytes / GIB * 10) / 10:g}"
