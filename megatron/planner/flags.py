"""The flags of pretrain_gpt.py that ask for a plan."""

from __future__ import annotations

from megatron.planner.hardware import GIB
from megatron.planner.plan import Plan

CHUNK, DEVICE_MEMORY, DISK, RECOMPUTE, INTERVAL = (
    f"--ds-sequence-parallel-fpdt-{name}"
    for name in ("chunk-size", "device-memory", "disk", "recompute", "checkpoint-interval")
)


def flags_of(plan: Plan) -> list[str]:
    """Return the flags for the execution of a plan, one per entry with its value."""
    job = plan.job
    flags = [
        f"--seq-length {job.model.seq_length}", f"--ds-sequence-parallel-size {job.sequence_parallel_size}",
        f"--zero-stage {job.zero_stage}", *["--cpu-optimizer"] * job.cpu_optimizer,
    ]  # fmt: skip
    if not job.streamed:
        return flags + {
            "kept": [],
            "recomputed": ["--deepspeed-activation-checkpointing"],
            "recomputed from the host": ["--deepspeed-activation-checkpointing", "--checkpoint-in-cpu"],
        }[job.activations]  # fmt: skip
    on_device = job.device_memory_bytes / GIB
    return [
        *flags, "--ds-sequence-parallel-fpdt", f"{CHUNK} {job.chunk_length}", "--ds-sequence-parallel-fpdt-offloading",
        *[f"{DEVICE_MEMORY} {on_device:g}"] * bool(on_device),
        *[f"{DISK} FOLDER"] * bool(plan.memory.disk_chunks),
        *[f"{RECOMPUTE} {job.recompute}"] * (job.recompute is not None),
        *[f"{INTERVAL} {job.checkpoint_interval}"] * (job.checkpoint_interval is not None),
    ]  # fmt: skip


def flags_to_change(before: Plan, after: Plan, left_open: frozenset[str]) -> list[str]:
    """Return the flags of `after` that `before` lacks, without those that a run chooses by itself."""
    present = set(flags_of(before))
    settled = left_open | {DISK} if before.machines.disk_memory_gib else left_open
    return [flag for flag in flags_of(after) if flag not in present and flag.split()[0] not in settled]
