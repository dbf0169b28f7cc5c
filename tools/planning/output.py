"""The lines and figures that tools/plan_context.py prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from megatron.planner.flags import flags_of
from megatron.planner.hardware import GIB
from megatron.planner.plan import Plan
from megatron.planner.reach import Variant, advice, longest, shortest_hiding_disk
from megatron.planner.report import execution_lines, fact_line
from megatron.planner.solver import Open, fastest
from megatron.planner.training import Phase, Training

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


@dataclass(frozen=True)
class Answer:
    """A plan, and what follows from it."""

    plan: Plan
    choices: Open
    variants: Sequence[Variant]
    training: Training | None
    longest: Plan | None

    @classmethod
    def of(cls, plan: Plan, choices: Open, variants: Sequence[Variant], training: Training | None) -> Answer:
        """Return the answer, which takes a second or two to find."""
        return cls(plan, choices, variants, training, longest(plan))


def figures_of(answer: Answer) -> dict[str, Any]:
    """Return all estimates by name; memory in GiB per GPU."""
    plan, reached = answer.plan, answer.longest
    job, memory, speed = plan.job, plan.memory, plan.speed
    with_any_chunk = fastest(plan, replace(answer.choices, chunk=True))
    return {
        "gpu": plan.machines.gpu.name, "gpu_rates_measured": plan.machines.gpu.is_measured, "gpus": job.num_gpus,
        "parameters": job.num_parameters, "trained_parameters": job.trained_parameters,
        "seq_length": job.model.seq_length, "chunk_length": job.chunk_length,
        "sequence_parallel_size": job.sequence_parallel_size, "zero_stage": job.zero_stage,
        "attention_backend": plan.backend, "recompute": memory.recompute,
        "checkpoint_interval": memory.checkpoint_interval,
        "gpu_gib": memory.gpu / GIB, "gpu_gib_with_overhead": memory.gpu_with_overhead / GIB,
        "gpu_states_gib": memory.states / GIB, "gpu_above_gib": (memory.gpu - memory.states) / GIB,
        "host_gib": memory.host / GIB, "host_chunks_gib": memory.host_chunks / GIB,
        "disk_chunks_gib": memory.disk_chunks / GIB, "disk_gbps": speed.disk_gbps,
        "waiting_for_disk_seconds": speed.waiting_for_disk,
        "step_seconds": speed.step, "forward_seconds": speed.forward, "backward_seconds": speed.backward,
        "head_seconds": speed.head, "optimizer_seconds": speed.optimizer, "waiting_seconds": speed.waiting,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu, "mfu": plan.mfu,
        **_training_figures(answer.training),
        "fits_gpu": plan.fits_gpu, "fits_host": plan.fits_host,
        "longest_context": reached.job.model.seq_length if reached else 0,
        "longest_context_flags": flags_of(reached) if reached else [],
        "smallest_hiding_chunk": plan.smallest_hiding_chunk(),
        "fastest_chunk": None if with_any_chunk is None else with_any_chunk.job.chunk_length,
        "advice": advice(plan, answer.variants),
    }  # fmt: skip


def _training_figures(training: Training | None) -> dict[str, Any]:
    if training is None:
        return {"training_tokens": None, "training_seconds": None}
    return {
        "training_tokens": training.num_tokens, "training_seconds": training.seconds,
        "training_gpu_gib_with_overhead": training.gpu_bytes / GIB, "training_host_gib": training.host_bytes / GIB,
        "training_phases": [
            {
                "seq_length": phase.plan.job.model.seq_length, "tokens": phase.num_tokens, "steps": phase.num_steps,
                "step_seconds": phase.plan.speed.step, "seconds": phase.seconds,
                "gpu_gib_with_overhead": phase.plan.memory.gpu_with_overhead / GIB,
                "host_gib": phase.plan.memory.host / GIB,
            }
            for phase in training.phases
        ],
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


def lines_of(answer: Answer, now: datetime) -> list[str]:
    """Format the estimates as lines of text; a training run starts `now`."""
    plan = answer.plan
    job, hiding, heads = plan.job, plan.smallest_hiding_chunk(), plan.job.shape.heads
    lines = [
        headline(plan),
        "",
        *execution_lines(plan, answer.choices),
        *[fact_line("attention", str(heads))] * bool(heads.num_heads % heads.num_ranks),
        *_training_lines(answer.training, now),
        "",
        _longest_line("longest context", answer.longest),
    ]
    for variant in answer.variants:
        lines.append(_longest_line(f"  with {' '.join(variant.flags)}", longest(variant.of(plan)), variant.flags))
    if job.streamed:
        lines += _hidden_disk_lines(plan)
        lines.append(f"smallest chunk that hides copies behind compute: {f'{hiding:,} tokens' if hiding else 'none'}")
    if plan.fits:
        return [*lines, "it fits; flags: " + " ".join(flags_of(plan))]
    where = " and ".join(name for name, fits in (("GPU", plan.fits_gpu), ("host", plan.fits_host)) if not fits)
    return [*lines, f"it does not fit the {where}:", *(f"  - {line}" for line in advice(plan, answer.variants))]


def _hidden_disk_lines(plan: Plan) -> list[str]:
    """Say from which length on compute hides the disk, if there is one."""
    if not plan.machines.disk_memory_gib:
        return []
    shortest = shortest_hiding_disk(plan)
    return [f"shortest context that hides the disk behind compute: {f'{shortest:,} tokens' if shortest else 'none'}"]


def _longest_line(name: str, reached: Plan | None, flags: Sequence[str] = ()) -> str:
    if reached is None:
        return f"{name}: none fits"
    return f"{name}: {reached.job.model.seq_length:,} tokens with {' '.join((*flags, *flags_of(reached)))}"


def _training_lines(training: Training | None, now: datetime) -> Iterator[str]:
    """Say how long a whole training run takes and, of several phases, what each takes and all of them need."""
    if training is None:
        return
    try:
        end = f"ends on {now + timedelta(seconds=training.seconds):%Y-%m-%d %H:%M}"
    except OverflowError:
        end = "does not end before the year 10000"
    yield fact_line("training", duration(training.seconds), f"{_steps(training)}; started now, it {end}")
    if len(training.phases) < 2:
        return
    for phase in training.phases:
        plan = phase.plan
        memory = _memory(plan.memory.gpu_with_overhead, plan.memory.host)
        steps = f"{_steps(phase)} of {plan.speed.step:.1f} s; {memory}"
        yield fact_line(f"  at {plan.job.model.seq_length:,}", duration(phase.seconds), steps)
    yield fact_line("  at most", _memory(training.gpu_bytes, training.host_bytes))


def _steps(training: Training | Phase) -> str:
    return f"{training.num_tokens:,} tokens in {training.num_steps:,} steps"


def _memory(on_gpu: int, on_host: int) -> str:
    return f"{on_gpu / GIB:.1f} GiB of GPU memory, {on_host / GIB:.1f} of host memory per GPU"


def duration(seconds: float) -> str:
    """Format a time in the unit that suits it."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.1f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.1f} minutes"
    return f"{seconds / _HOUR:.1f} hours" if seconds < 2 * _DAY else f"{seconds / _DAY:,.1f} days"
