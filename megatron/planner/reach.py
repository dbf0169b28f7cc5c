"""Search over all that may be changed of a run: the longest context that fits, and the fastest way to fit a length.

as it is      the model, the batch, and what is trained
searched      FPDT, ranks per sequence, ZeRO stage, optimizer on the host, chunk, what is recomputed, and chunks on
              the GPU, as many as it has room for; the interval of the saved inputs is the smallest that fits
in addition   other ways to train the model, such as adapters; a disk, or a larger one; more GPUs; more host memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron.config import HuggingFaceModelConfig, ModelConfig, Recompute
from megatron.planner.flags import flags_of
from megatron.planner.hardware import GIB
from megatron.planner.job import Job
from megatron.planner.plan import CHUNKS, GRANULE, Plan
from megatron.planner.solver import AS_FAST, with_free_device_memory

MOST_GPUS = 4096
LARGE_DISK_GIB = 2.0**20
Describe = Callable[[Plan], Sequence[str]]
"""The flags to give for a plan."""


@dataclass(frozen=True)
class Variant:
    """Another way to train the model, and the flags that ask for it."""

    flags: tuple[str, ...]
    model: ModelConfig

    def of(self, plan: Plan) -> Plan:
        """Return the plan with this model, at the plan's length."""
        return plan.with_job(replace(plan.job, model=self.model).at(plan.job.model.seq_length, plan.job.chunk_length))


def longest(plan: Plan) -> Plan | None:
    """Return the plan of the longest sequence that fits, run in the fastest way; None where none fits."""
    step = GRANULE * plan.job.num_gpus
    most = _num_positions(plan.job.model)
    units = 0
    for way in _ways(_at(plan, CHUNKS[-1] * plan.job.num_gpus)):
        units = _most_units(way, units, step, most)
    return fastest_that_fits(_at(plan, units * step)) if units else None


def fastest_that_fits(plan: Plan) -> Plan | None:
    """Return the fastest way to run the plan's length; None where none fits.

    Of those within a percent, it is the one that changes the fewest settings.
    """
    fitting = [way for way in map(_filled, _ways(plan)) if way.fits]
    if not fitting:
        return None
    shortest = min(way.speed.step for way in fitting)
    as_fast = [way for way in fitting if way.speed.step <= AS_FAST * shortest]
    return min(as_fast, key=lambda way: _num_changes(plan.job, way.job))


def shortest_hiding_disk(plan: Plan) -> int | None:
    """Return the shortest power-of-two multiple of tokens that uses the disk and does not wait for it, or None."""
    length = GRANULE * plan.job.sequence_parallel_size
    while (at := _at(plan, length)).fits:
        if at.memory.disk_chunks and not at.speed.waiting_for_disk:
            return length
        length *= 2
    return None


def advice(plan: Plan, variants: Iterable[Variant] = (), describe: Describe = flags_of) -> list[str]:
    """Return what to change where the plan does not fit, the least change first; [] where it fits."""
    if plan.fits:
        return []
    lines = []
    if way := fastest_that_fits(plan):
        lines.append(_line(way, describe))
    else:
        trained_otherwise = ((variant.flags, fastest_that_fits(variant.of(plan))) for variant in variants)
        lines += [_line(way, describe, flags) for flags, way in trained_otherwise if way is not None][:1]
        lines += _with_a_disk(plan, describe)
        lines += _on_more_gpus(plan, describe)
        lines += _with_more_host_memory(plan, describe)
    if reached := longest(plan):
        lines.append(f"{' '.join(describe(reached))} is the longest that fits")
    return lines or ["GPUs with more memory"]


def _line(plan: Plan, describe: Describe, flags: Sequence[str] = ()) -> str:
    return " ".join((*flags, *describe(plan), f"fits, with {plan.speed.step:.1f} s per step"))


def _ways(plan: Plan) -> Iterator[Plan]:
    """Yield the plan with every combination of what may be changed, the lowest memory first."""
    job = plan.job
    if not job.streamed:
        yield plan
    if job.model.attention_dropout:  # which FPDT cannot replay
        return
    settings = product(
        Recompute,
        dict.fromkeys((job.cpu_optimizer, True)),
        dict.fromkeys((job.zero_stage, 3)),
        dict.fromkeys((job.num_gpus, job.sequence_parallel_size)),
    )
    for recompute, cpu_optimizer, zero_stage, shared in settings:
        changed = replace(
            job,
            streamed=True,
            recompute=recompute,
            checkpoint_interval=None,
            cpu_optimizer=cpu_optimizer,
            zero_stage=zero_stage,
            sequence_parallel_size=shared,
        )
        yield from plan.with_job(changed).with_chunks()


def _filled(plan: Plan) -> Plan:
    """Return the plan with as many chunks on the GPU as it has room for."""
    return with_free_device_memory(plan) if plan.job.streamed else plan


def _at(plan: Plan, length: int) -> Plan:
    return plan.with_job(plan.job.at(length, min(plan.job.chunk_length, length) if plan.job.streamed else length))


def _most_units(way: Plan, least: int, step: int, most: int | None) -> int:
    """Return the steps of tokens of the longest sequence above `least` that fits, or `least`."""

    def fits(units: int) -> bool:
        return (most is None or units * step <= most) and _filled(_at(way, units * step)).fits

    low, gap = least, 1
    while fits(low + gap):
        low, gap = low + gap, 2 * gap
    high = low + gap
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _num_positions(model: ModelConfig) -> int | None:
    """Return the positions that a Hugging Face model has learned; None where positions do not bound the length."""
    is_bounded = isinstance(model, HuggingFaceModelConfig) and not model.use_rotary_position_embeddings
    return model.max_position_embeddings if is_bounded else None


def _num_changes(before: Job, after: Job) -> int:
    """Return how many settings differ besides those of chunks."""
    names = ("streamed", "cpu_optimizer", "zero_stage", "sequence_parallel_size")
    return sum(getattr(before, name) != getattr(after, name) for name in names)


def _on_more_gpus(plan: Plan, describe: Describe) -> list[str]:
    """Say how many GPUs on such machines would hold the run."""
    number = plan.job.num_gpus
    while number < MOST_GPUS:
        number *= 2
        if way := fastest_that_fits(_with_gpus(plan, number)):
            machines = f" on {way.machines.num_nodes} machines" * (way.machines.num_nodes > 1)
            return [f"{number} GPUs{machines}: {_line(way, describe)}"]
    return []


def _with_gpus(plan: Plan, number: int) -> Plan:
    job = plan.job
    shared = number if job.sequence_parallel_size == job.num_gpus else job.sequence_parallel_size
    changed = replace(job, num_gpus=number, sequence_parallel_size=shared)
    return replace(plan, job=changed, machines=replace(plan.machines, num_gpus=number))


def _with_a_disk(plan: Plan, describe: Describe) -> list[str]:
    """Say how much disk would hold the run, where the host has too little memory, and at which rate it is hidden."""
    machines = replace(plan.machines, disk_memory_gib=LARGE_DISK_GIB, disk=None)
    way = fastest_that_fits(replace(plan, machines=machines))
    if way is None:
        return []
    per_node = min(way.machines.gpus_per_node, way.job.num_gpus)
    gib, rate = way.memory.disk_reserved * per_node / GIB, way.speed.disk_gbps * per_node
    return [f"{int(gib) + 1} GiB of disk per machine, hidden behind compute at {rate:.2f} GB/s: {_line(way, describe)}"]


def _with_more_host_memory(plan: Plan, describe: Describe) -> list[str]:
    """Say how much host memory would hold the run, where the GPUs can."""
    without = replace(plan, machines=replace(plan.machines, host_memory_gib=0.0))  # so that the least is saved
    on_gpu = [way for way in map(_filled, _ways(without)) if way.fits_gpu]
    if not on_gpu:
        return []
    way = min(on_gpu, key=lambda each: each.memory.host)
    gib = way.memory.host * min(way.machines.gpus_per_node, way.job.num_gpus) / GIB
    return [" ".join((f"{int(gib) + 1} GiB of host memory per machine, with", *describe(way)))]
