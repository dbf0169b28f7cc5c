"""Choice of how to execute the model, from the configuration and the memory of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from math import ceil
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron.config import Config, ConfigError, Recompute, default_chunk, offloads, sample_lengths
from megatron.finetuning.grouped_dataset import bucket_lengths
from megatron.fpdt.memory_model import (
    StreamShape,
    TierBudget,
    choose_saved_activations,
    least_bytes,
    longest_sequence,
    saving_order,
)
from megatron.fpdt.stream import Saving
from megatron.initialize import Context
from megatron.launch.disk import disk_memory, disk_warnings
from megatron.launch.intervals import interval_warnings
from megatron.model.builder import Execution
from megatron.model.layers import attention_request, has_short_tiles
from megatron.ops.attention import choose_backend
from megatron.planner.flags import flags_to_change
from megatron.planner.hardware import GIB, HOST_HEADROOM, Gpu, Machines, gpu_like
from megatron.planner.job import HALF, Job
from megatron.planner.memory import ACCURACY
from megatron.planner.plan import Plan
from megatron.planner.reach import advice
from megatron.planner.solver import Open, fastest, with_free_device_memory
from megatron.planner.training import Training, shorter_plans
from megatron.ranks.world import local_world_size
from megatron.training.lengths import phases_of_run

_STEP = GIB // 10


@dataclass(frozen=True)
class _Streaming:
    """How FPDT executes the model."""

    chunk_size: int
    device_bytes: int  # of chunks
    recompute: Recompute
    checkpoint_interval: int

    @property
    def saved(self) -> tuple[int, int]:
        """What orders choices by how much they save for backward."""
        return saving_order(self.recompute, self.checkpoint_interval)


class ChosenExecution(NamedTuple):
    """How a run executes; the plan behind it, None where the planner does not cover it; and what was chosen there.

    `shorter` are the plans of steps below --seq-length, by length.
    """

    execution: Execution
    plan: Plan | None
    choices: Open = Open()
    shorter: Mapping[int, Plan] = MappingProxyType({})


def plan_execution(config: Config, context: Context, padded_vocab_size: int) -> ChosenExecution:
    """Return what the flags say; choose what they leave open by the memory available. Collective over all ranks.

    Raises:
        ConfigError: the run does not fit host memory or, as far as the planner can tell, GPU memory.
    """
    plain = Execution(
        activation_checkpointing=config.deepspeed.deepspeed_activation_checkpointing,
        checkpoint_in_cpu=config.deepspeed.checkpoint_in_cpu,
        documents=config.data.reset_attention_mask,
    )
    plan, host_memory = _plan_and_host_memory(config, context, padded_vocab_size)
    with_fpdt = config.parallel.ds_sequence_parallel_fpdt
    choices, shorter = Open.of(config) if with_fpdt else Open(), dict[int, Plan]()
    if plan is not None:
        plan = _solved(plan, choices) if with_fpdt else plan
        shorter = shorter_plans(plan, choices, _shorter_lengths(config, context.parallel_state.world_size))
    if not with_fpdt:
        return ChosenExecution(plain, plan, choices, shorter)
    if plan is None:
        streaming: _Streaming | None = _unplanned(config, context, host_memory)
    else:
        _warn_of_plan(config, context, plan, shorter)
        streaming = _of_first_rank(_streaming_of(plan) if plan.job.streamed else None, context)
    if streaming is None:
        return ChosenExecution(plain, plan, choices, shorter)
    shape, recompute, interval = _shape(config, context, streaming), streaming.recompute, streaming.checkpoint_interval
    by_length: Mapping[int, Saving] = {}
    with_disk = None
    if config.parallel.ds_sequence_parallel_fpdt_offloading:
        budget = TierBudget(host_memory, streaming.device_bytes, disk_memory(config, context))
        _check_host_memory(shape, streaming, budget, config, plan)
        needed = shape.host_bytes(streaming.device_bytes, interval, recompute)
        with_disk = shape.on_host_and_disk(budget, interval, recompute) if needed > host_memory else None
        by_length = _by_length(config, context, streaming, shorter, max(host_memory - needed, 0))
    streamed = replace(
        plain,
        fpdt=True,
        chunk_size=streaming.chunk_size,
        offloading=config.parallel.ds_sequence_parallel_fpdt_offloading,
        device_budget=shape.device_budget(streaming.device_bytes, interval, recompute),
        host_memory_bytes=host_memory if with_disk is None else with_disk.host_bytes,
        disk=None if with_disk is None else with_disk.budget(config.parallel.ds_sequence_parallel_fpdt_disk or ()),
        checkpoint_interval=interval,
        recompute=recompute,
        by_length=by_length,
    )
    return ChosenExecution(streamed, plan, choices, shorter)


def _warn_of_plan(config: Config, context: Context, plan: Plan, shorter: Mapping[int, Plan]) -> None:
    if context.parallel_state.rank == 0:
        training = Training.of(plan, shorter, phases_of_run(config, plan.job.num_gpus))
        for line in (*interval_warnings(config, plan, training), *disk_warnings(plan)):
            context.log.warning(line)


def _shorter_lengths(config: Config, world_size: int) -> list[int]:
    """Return the lengths of steps below --seq-length, the longest first."""
    lengths, longest = sample_lengths(config, world_size), config.model.seq_length
    if lengths.is_grouped:
        return bucket_lengths(longest, longest, config.parallel.ds_sequence_parallel_size)[-2::-1]
    return sorted({length for _, length in lengths.phases} - {longest}, reverse=True)


def _by_length(
    config: Config, context: Context, longest: _Streaming, shorter: Mapping[int, Plan], host_left: int
) -> dict[int, Saving]:
    """Return what steps of each length below --seq-length save, by their plans or, without one, by host memory."""
    by_length = dict[int, Saving]()
    for length in _shorter_lengths(config, context.parallel_state.world_size):
        at_length = replace(config, model=replace(config.model, seq_length=length))
        if length in shorter:
            streaming = _streaming_of(shorter[length])
        else:
            streaming, host_left = _unplanned_beside(longest, at_length, context, host_left)
        streaming = replace(_of_first_rank(streaming, context) or longest, chunk_size=longest.chunk_size)
        by_length[length] = _saving_of(streaming, _shape(at_length, context, streaming))
    return by_length


def _saving_of(streaming: _Streaming, shape: StreamShape) -> Saving:
    """Return what sequences of this shape save, and the memory that they need."""
    recompute, interval, device = streaming.recompute, streaming.checkpoint_interval, streaming.device_bytes
    budget = shape.device_budget(device, interval, recompute)
    return Saving(recompute, interval, budget, shape.host_bytes(device, interval, recompute))


def _streaming_of(plan: Plan) -> _Streaming:
    job, memory = plan.job, plan.memory
    return _Streaming(job.chunk_length, job.device_memory_bytes, memory.recompute, memory.checkpoint_interval)


def _unplanned(config: Config, context: Context, host_memory: int) -> _Streaming:
    """Return what the flags say, and the default chunk; with offloading, save for backward what memory has room for."""
    parallel = config.parallel
    chunk = parallel.ds_sequence_parallel_fpdt_chunk_size or default_chunk(parallel.ds_sequence_parallel_size)
    device_bytes = int((parallel.ds_sequence_parallel_fpdt_device_memory or 0) * GIB)
    recompute = parallel.ds_sequence_parallel_fpdt_recompute
    interval = parallel.ds_sequence_parallel_fpdt_checkpoint_interval
    streaming = _Streaming(chunk, device_bytes, recompute or Recompute.ALL, interval or 1)
    if parallel.ds_sequence_parallel_fpdt_offloading:
        shape = _shape(config, context, streaming)
        budget = TierBudget(host_memory, device_bytes, disk_memory(config, context))
        recompute, interval = choose_saved_activations(shape, budget, recompute, interval)
        streaming = replace(streaming, recompute=recompute, checkpoint_interval=interval)
    return streaming


def _unplanned_beside(longest: _Streaming, config: Config, context: Context, host_left: int) -> tuple[_Streaming, int]:
    """Choose as `shorter_plans` does, without a plan; return the choice, and the host memory that is then left."""
    own = replace(_unplanned(config, context, host_left), chunk_size=longest.chunk_size)
    needed = _shape(config, context, own).host_bytes(own.device_bytes, own.checkpoint_interval, own.recompute)
    if needed > host_left or own.saved < longest.saved:
        return replace(longest, device_bytes=own.device_bytes), host_left
    return own, host_left - needed


def _solved(plan: Plan, choices: Open) -> Plan:
    """Return the plan of the fastest execution that the flags allow and that fits. ConfigError where none fits."""
    solved = fastest(plan, choices)
    if solved is None and choices.chunk:
        raise ConfigError(_no_chunk_fits(plan, choices))
    if solved is None:
        solved = with_free_device_memory(plan) if choices.device_memory else plan
        check_gpu_memory(solved, choices)
    return solved


def _of_first_rank(streaming: _Streaming | None, context: Context) -> _Streaming | None:
    """Return what the first rank has decided on: ranks with other GPUs may have decided on something else."""
    decided = [streaming]
    if context.parallel_state.world_size > 1:
        dist.broadcast_object_list(decided, src=0, device=context.device)
    return decided[0]


def _shape(config: Config, context: Context, streaming: _Streaming) -> StreamShape:
    size, batch = config.parallel.ds_sequence_parallel_size, config.training.micro_batch_size
    return StreamShape.of(config.model, streaming.chunk_size, size, batch, context.dtype.itemsize)


def _plan_and_host_memory(config: Config, context: Context, padded_vocab_size: int) -> tuple[Plan | None, int]:
    """Return the plan of the run, None where it is not planned, and the bytes of chunks that the host may hold."""
    asked = config.parallel.ds_sequence_parallel_fpdt_host_memory
    host_memory = int(context.host_memory_bytes * (1 - HOST_HEADROOM))
    plan = plan_of_run(config, context, padded_vocab_size, host_memory)
    rest = 0 if plan is None else plan.memory.host_states + plan.memory.host_process
    if asked is None:
        return plan, max(host_memory - rest, 0)
    host_memory = int(asked * GIB)
    return plan_of_run(config, context, padded_vocab_size, host_memory + rest), host_memory


def plan_of_run(config: Config, context: Context, padded_vocab_size: int, host_memory: int) -> Plan | None:
    """Plan the run on the smallest GPU; None where the planner does not cover such a run."""
    parallel = config.parallel
    on_gpu_alone = parallel.ds_sequence_parallel_fpdt and not parallel.ds_sequence_parallel_fpdt_offloading
    in_half = context.dtype.itemsize == HALF
    if context.device.type != "cuda" or on_gpu_alone or not in_half or offloads(config, "offload_param"):
        return None
    gpu = gpu_like(torch.cuda.get_device_name(context.device), context.device_memory_bytes)
    kernel = attention_kernel(config, context)
    plan = plan_of(config, context.parallel_state.world_size, gpu, host_memory, padded_vocab_size, kernel)
    on_disk = disk_memory(config, context) * plan.machines.gpus_per_node / GIB
    measured = replace(plan.machines, measured_link=context.link, disk_memory_gib=on_disk, disk=context.disk_rates)
    return replace(plan, machines=measured)


def attention_kernel(config: Config, context: Context) -> str:
    """Return the name of the attention backend that a run takes."""
    model, num_ranks = config.model, config.parallel.ds_sequence_parallel_size
    request = attention_request(model, context.device, context.dtype)
    short_tiles = has_short_tiles(model, num_ranks, config.data.reset_attention_mask)
    return choose_backend(model.attention_backend, request, short_tiles).name


def plan_of(
    config: Config, num_gpus: int, gpu: Gpu, host_memory: int, padded_vocab_size: int, backend: str = "auto"
) -> Plan:
    """Plan a run on `num_gpus` GPUs with `host_memory` bytes each; a kernel without rates counts as `auto`."""
    per_node = min(local_world_size(), num_gpus)
    machines = Machines(gpu, num_gpus, per_node, host_memory * per_node / GIB)
    return Plan(Job.of(config, num_gpus, padded_vocab_size), machines, gpu.rated(backend) or gpu.fastest)


def _advice(plan: Plan, choices: Open) -> str:
    """Say what to change, without the flags whose values a run chooses by itself."""
    chosen = choices.flags_of(plan.job)
    return "; ".join(advice(plan, describe=lambda way: flags_to_change(plan, way, chosen)))


def _no_chunk_fits(plan: Plan, choices: Open) -> str:
    host = plan.machines.host_bytes_per_gpu / GIB
    return (
        f"no chunk of --seq-length ({plan.job.model.seq_length}) fits {plan.job.num_gpus} GPUs of "
        f"{plan.machines.gpu.memory_gib:.1f} GiB with {host:.3g} GiB of host memory each; "
        f"{_advice(plan, choices)}"
    )


def check_gpu_memory(plan: Plan, choices: Open) -> None:
    """Raise ConfigError if the tensors need more than the GPU has, even with the planner's error allowed for."""
    needed, memory = plan.memory, plan.machines.gpu.memory_gib
    if needed.gpu * (1 - ACCURACY) > memory * GIB:
        raise ConfigError(
            f"the run needs about {needed.gpu / GIB:.0f} GiB of GPU memory per rank, {needed.states / GIB:.0f} of "
            f"it for the model, and the smallest GPU has {memory:.1f} GiB; {_advice(plan, choices)}"
        )


def _check_host_memory(
    shape: StreamShape, streaming: _Streaming, budget: TierBudget, config: Config, plan: Plan | None
) -> None:
    host_memory, device = budget.host_bytes, streaming.device_bytes
    how = streaming.checkpoint_interval, streaming.recompute
    needed = shape.host_bytes(device, *how)
    if shape.fits(budget, *how):
        return
    least = least_bytes(shape, device)
    is_free_memory = config.parallel.ds_sequence_parallel_fpdt_host_memory is None
    if least <= host_memory:
        recompute, interval = choose_saved_activations(shape, TierBudget(host_memory, device))
        remedy = (
            "leave out --ds-sequence-parallel-fpdt-recompute and --ds-sequence-parallel-fpdt-checkpoint-interval, so "
            f"that they are chosen to fit: {recompute} and {interval}"
        )
    elif plan is not None:
        remedy = _advice(plan, Open.of(config))
        if not is_free_memory:
            remedy += f"; or raise --ds-sequence-parallel-fpdt-host-memory to {_gib_up(least)}"
    else:
        longest = longest_sequence(shape, budget)
        ways = [f"use --seq-length {longest} or less"] * bool(longest)
        ways.append(f"raise --ds-sequence-parallel-size ({shape.layout.sequence_parallel_size})")
        on_device = next(n for n in count(device, _STEP) if least_bytes(shape, n) <= host_memory)
        ways.append(f"raise --ds-sequence-parallel-fpdt-device-memory to {_gib_up(on_device)}")
        if not is_free_memory:
            ways.append(f"raise --ds-sequence-parallel-fpdt-host-memory to {_gib_up(least)}")
        ways += _disk_advice(config, shape.least_host_bytes_with_disk(device), host_memory)
        remedy = f"{', or '.join(ways)}, or see tools/plan_context.py for what would fit"
    whose = "are free for a rank here" if is_free_memory else "may be used (--ds-sequence-parallel-fpdt-host-memory)"
    raise ConfigError(
        f"the chunks of --seq-length ({shape.layout.sequence_length}) take up {needed / GIB:.4g} GiB of host memory "
        f"per rank, and {host_memory / GIB:.4g} GiB {whose}; {remedy}"
    )


def _disk_advice(config: Config, least_on_host: int, host_memory: int) -> list[str]:
    """Return what a disk, or more of it, would do."""
    flag = "--ds-sequence-parallel-fpdt-disk"
    if config.parallel.ds_sequence_parallel_fpdt_disk is None:
        return [f"name a folder on a local disk with {flag}"] * (least_on_host <= host_memory)
    if least_on_host > host_memory:
        return [f"give the host {_gib_up(least_on_host)} GiB, without which {flag} is of no use"]
    return [f"give {flag} more space"]


def _gib_up(num_bytes: int) -> str:
    """Round up to a tenth of a GiB, so that a budget of this size is enough."""
    return f"{ceil(num_bytes / GIB * 10) / 10:g}"
