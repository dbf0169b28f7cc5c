"""Choice of what a run leaves open: the fastest execution that fits the memory of GPU and host.

Open can be the chunk size, the chunks that stay on the GPU, what the backward pass recomputes, the interval of the
saved inputs, and FPDT itself: where plain execution fits and is faster, nothing is streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.config import Config, Recompute
from megatron.planner.flags import CHUNK, DEVICE_MEMORY, INTERVAL, RECOMPUTE
from megatron.planner.hardware import GIB
from megatron.planner.job import Job
from megatron.planner.memory import ACCURACY, FRAGMENTATION, OUTSIDE_TORCH
from megatron.planner.plan import Plan

AS_FAST = 1.01  # of the shortest step; of the executions within it, the one with the smallest chunk is chosen
STEP = GIB // 2  # of the device memory chosen


@dataclass(frozen=True)
class Open:
    """What a run leaves open, besides `recompute` and `checkpoint_interval` of the job that are None."""

    chunk: bool = False
    device_memory: bool = False
    plain: bool = False
    """Whether the run may execute without FPDT."""

    @classmethod
    def of(cls, config: Config) -> Open:
        """Return what the flags of a run leave open. With none of FPDT's settings given, FPDT itself is."""
        parallel = config.parallel
        chunk = not parallel.ds_sequence_parallel_fpdt_chunk_size
        device_memory = parallel.ds_sequence_parallel_fpdt_device_memory is None
        others = (
            parallel.ds_sequence_parallel_fpdt_host_memory,
            parallel.ds_sequence_parallel_fpdt_disk,
            parallel.ds_sequence_parallel_fpdt_recompute,
            parallel.ds_sequence_parallel_fpdt_checkpoint_interval,
        )
        return cls(chunk, device_memory, chunk and device_memory and all(value is None for value in others))

    def flags_of(self, job: Job) -> frozenset[str]:
        """Return the flags of what is left open of a job, which a run chooses by itself."""
        is_open = {
            CHUNK: self.chunk,
            DEVICE_MEMORY: self.device_memory,
            RECOMPUTE: job.recompute is None,
            INTERVAL: job.checkpoint_interval is None,
        }
        return frozenset(flag for flag, left in is_open.items() if left)


def fastest(plan: Plan, choices: Open) -> Plan | None:
    """Return the plan with the fastest execution that fits; None where none fits."""
    fitting = [each for each in _candidates(plan, choices) if each.fits]
    if not fitting and choices.device_memory:
        fitting = [each for each in _candidates_by_level(plan, choices) if each.fits]
    if not fitting:
        return None
    shortest = min(each.speed.step for each in fitting)
    return next(each for each in fitting if each.speed.step <= AS_FAST * shortest)


def with_free_device_memory(plan: Plan) -> Plan:
    """Return the plan with as many chunks on the GPU as it has room for, whatever the blocks save or recompute.

    The rest of the run may need more than is planned, by the planner's accuracy.
    """
    recompute = plan.job.recompute or Recompute.NONE
    interval = plan.job.checkpoint_interval or 1  # on which the rest does not depend
    bare = replace(plan.job, device_memory_bytes=0, recompute=recompute, checkpoint_interval=interval)
    rest = plan.with_job(bare).memory
    usable = (plan.machines.gpu.memory_gib * GIB - OUTSIDE_TORCH) / FRAGMENTATION
    free = max(int(usable - rest.gpu * (1 + ACCURACY)) // STEP * STEP, 0)
    return plan.with_job(replace(plan.job, device_memory_bytes=free))


def _candidates_by_level(plan: Plan, choices: Open) -> Iterator[Plan]:
    """Yield what saves one level of activations, and has as many chunks on the GPU as that leaves room for."""
    if plan.job.recompute is None:
        for recompute in Recompute:
            yield from _candidates(plan.with_job(replace(plan.job, recompute=recompute)), replace(choices, plain=False))


def _candidates(plan: Plan, choices: Open) -> Iterator[Plan]:
    if choices.plain:
        length = plan.job.model.seq_length
        yield plan.with_job(replace(plan.job, streamed=False, chunk_length=length, device_memory_bytes=0))
    for each in plan.with_chunks() if choices.chunk else [plan]:
        yield with_free_device_memory(each) if choices.device_memory and each.job.streamed else each
