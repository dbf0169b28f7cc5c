"""The lines that say how a run executes: the same in the log of a run and from tools/plan_context.py."""

from __future__ import annotations

from megatron.config import Recompute
from megatron.fpdt.device_budget import ChunkKind
from megatron.planner.hardware import GIB
from megatron.planner.plan import Plan
from megatron.planner.solver import Open

_RECOMPUTED = {
    Recompute.ATTENTION: "all matrix products, and attention",
    Recompute.KV: "all matrix products but the last, those before attention twice",
    Recompute.ALL: "all matrix products but the last",
    Recompute.MLP: "the matrix products of the MLP",
    Recompute.NONE: "no matrix product, except on first slices of chunks that do not stay on the GPU",
}
_NAMES = {
    ChunkKind.KEY_VALUE_GRADIENTS: "gradients of keys and values",
    ChunkKind.KEYS_VALUES: "keys and values",
    ChunkKind.ATTENTION_OUTPUTS: "attention outputs",
    ChunkKind.PRODUCTS: "outputs of matrix products",
    ChunkKind.HIDDEN_GRADIENTS: "gradients of hidden states",
    ChunkKind.HIDDEN_STATES: "hidden states",
}


def execution_lines(plan: Plan, choices: Open) -> list[str]:
    """Say how the run executes, what of it was chosen, and what it needs by the planner's estimate."""
    memory, speed, machines = plan.memory, plan.speed, plan.machines
    per_node = min(machines.gpus_per_node, plan.job.num_gpus)
    return [
        f"execution on {plan.job.num_gpus} {machines.gpu.name}{' (rates estimated)' * (not machines.gpu.is_measured)}:",
        *_settings(plan, choices),
        fact_line(
            "GPU memory",
            f"{memory.gpu / GIB:.1f} GiB",
            f"{memory.states / GIB:.1f} of model states, {(memory.gpu - memory.states) / GIB:.1f} above; "
            f"{memory.gpu_with_overhead / GIB:.1f} of {machines.gpu.memory_gib:.1f} with what is not torch's",
        ),
        fact_line(
            "host memory",
            f"{memory.host / GIB:.1f} GiB",
            f"of {machines.host_bytes_per_gpu / GIB:.1f}; {memory.host * per_node / GIB:.0f} per machine, "
            f"{memory.host_chunks / GIB:.1f} of activations per GPU, pinned",
        ),
        *_on_disk(plan),
        fact_line(
            "step",
            f"{speed.step:.1f} s",
            f"forward {speed.forward:.1f}, backward {speed.backward:.1f}, head {speed.head:.1f}, optimizer "
            f"{speed.optimizer:.1f}; {speed.waiting:.1f} of it waiting for copies and collectives",
        ),
        fact_line("speed", f"{plan.tokens_per_second_per_gpu:.1f} tokens/s/GPU, MFU {plan.mfu:.1%}"),
    ]


def _on_disk(plan: Plan) -> list[str]:
    """Say what the disk takes, and how fast it has to be."""
    memory, speed, disk = plan.memory, plan.speed, plan.machines.disk
    if not memory.disk_chunks:
        return []
    rate = "" if disk is None else f"; it gives {disk}"
    return [
        fact_line(
            "disk",
            f"{memory.disk_chunks / GIB:.1f} GiB",
            f"of {plan.machines.disk_bytes_per_gpu / GIB:.1f}; {memory.disk_share:.0%} of what is copied once, hidden "
            f"at {speed.disk_gbps:.2f} GB/s{rate}",
        )
    ]


def _settings(plan: Plan, choices: Open) -> list[str]:
    job, memory = plan.job, plan.memory
    if not job.streamed:
        chosen = ", chosen: the sequence fits the GPU, and is faster in one piece" * choices.plain
        return [fact_line("without FPDT", f"activations {job.activations}{chosen}")]
    return [
        chunk_line(job.chunk_length, choices.chunk),
        _device_chunks_line(plan, choices.device_memory),
        recompute_line(memory.recompute, memory.checkpoint_interval),
    ]


def fact_line(label: str, value: str, detail: str = "") -> str:
    """Format one fact about a run: label, value and detail, each in a column of its own."""
    return f"  {label:<16s} {value:<15s} {detail}".rstrip()


def chunk_line(num_tokens: int, is_chosen: bool = False) -> str:
    """Say how long a chunk is."""
    return fact_line("chunk", f"{num_tokens:,} tokens{', chosen' * is_chosen}")


def recompute_line(recompute: Recompute, checkpoint_interval: int) -> str:
    """Say what the backward pass recomputes of a streamed block."""
    every = "" if checkpoint_interval == 1 else f"; inputs saved of one block in {checkpoint_interval}"
    return fact_line("recompute", recompute, f"{_RECOMPUTED[recompute]}{every}")


def _device_chunks_line(plan: Plan, is_chosen: bool) -> str:
    """Say which chunks stay on the GPU."""
    shape, how = plan.job.shape, (plan.memory.checkpoint_interval, plan.memory.recompute)
    needed, stored = shape.kind_bytes(*how), shape.device_bytes(plan.job.device_memory_bytes, *how)
    first_products = shape.num_layers * sum(shape.first_product_chunks(plan.memory.recompute))
    first_slices = shape.device_budget(plan.job.device_memory_bytes, *how).first_slices
    shares = {_NAMES[kind]: stored[kind] / needed[kind] for kind in needed if stored[kind]}
    kinds = [name if share == 1 else f"{share:.0%} of {name}" for name, share in shares.items()]
    if shares and stored == needed:
        recomputed = f"; {1 - first_slices:.0%} of the products of first slices recomputed"
        kinds = [f"all of them{recomputed if first_products and first_slices < 1 else ''}"]
    num_bytes = (sum(stored.values()) + first_slices * first_products) if shares else 0
    return fact_line("chunks on GPU", f"{num_bytes / GIB:.1f} GiB", ", ".join([*kinds, *["chosen"] * is_chosen]))
