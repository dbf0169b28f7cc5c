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
        f"  GPU memory       {memory.gpu / GIB:9.1f} GiB   {memory.states / GIB:.1f} of model states, "
        f"{(memory.gpu - memory.states) / GIB:.1f} above; {memory.gpu_with_overhead / GIB:.1f} of "
        f"{machines.gpu.memory_gib:.1f} with what is not torch's",
        f"  host memory      {memory.host / GIB:9.1f} GiB   of {machines.host_bytes_per_gpu / GIB:.1f}; "
        f"{memory.host * per_node / GIB:.0f} per machine, {memory.host_chunks / GIB:.1f} of activations per GPU, "
        "pinned",
        *_on_disk(plan),
        f"  step             {speed.step:9.1f} s     forward {speed.forward:.1f}, backward {speed.backward:.1f}, head "
        f"{speed.head:.1f}, optimizer {speed.optimizer:.1f}; {speed.waiting:.1f} of it waiting for copies and "
        "collectives",
        f"  speed            {plan.tokens_per_second_per_gpu:9.1f} tokens/s/GPU, MFU {plan.mfu:.1%}",
    ]


def _on_disk(plan: Plan) -> list[str]:
    """Say what the disk takes, and how fast it has to be."""
    memory, speed, disk = plan.memory, plan.speed, plan.machines.disk
    if not memory.disk_chunks:
        return []
    rate = "" if disk is None else f"; it gives {disk}"
    return [
        f"  disk             {memory.disk_chunks / GIB:9.1f} GiB   of {plan.machines.disk_bytes_per_gpu / GIB:.1f}; "
        f"{memory.disk_share:.0%} of what is copied once, hidden at {speed.disk_gbps:.2f} GB/s{rate}"
    ]


def _settings(plan: Plan, choices: Open) -> list[str]:
    job, memory = plan.job, plan.memory
    if not job.streamed:
        chosen = ", chosen: the sequence fits the GPU, and is faster in one piece" * choices.plain
        return [f"  without FPDT     activations {job.activations}{chosen}"]
    return [
        chunk_line(job.chunk_length, choices.chunk),
        f"  chunks on GPU    {_on_gpu(plan)}{', chosen' * choices.device_memory}",
        recompute_line(memory.recompute, memory.checkpoint_interval),
    ]


def chunk_line(num_tokens: int, is_chosen: bool = False) -> str:
    """Say how long a chunk is."""
    return f"  chunk            {num_tokens:9,} tokens{', chosen' * is_chosen}"


def recompute_line(recompute: Recompute, checkpoint_interval: int) -> str:
    """Say what the backward pass recomputes of a streamed block."""
    every = "" if checkpoint_interval == 1 else f"; inputs saved of one block in {checkpoint_interval}"
    return f"  recompute        {recompute:>9s}       {_RECOMPUTED[recompute]}{every}"


def _on_gpu(plan: Plan) -> str:
    """Say which chunks stay on the GPU."""
    shape, how = plan.job.shape, (plan.memory.checkpoint_interval, plan.memory.recompute)
    needed, stored = shape.kind_bytes(*how), shape.device_bytes(plan.job.device_memory_bytes, *how)
    if not any(stored.values()):
        return f"{0:9.1f} GiB"
    first_products = shape.num_layers * sum(shape.first_product_chunks(plan.memory.recompute))
    first_slices = shape.device_budget(plan.job.device_memory_bytes, *how).first_slices
    total = f"{(sum(stored.values()) + first_slices * first_products) / GIB:9.1f} GiB"
    if stored == needed:
        recomputed = f"; {1 - first_slices:.0%} of the products of first slices recomputed"
        return f"{total}   all of them{recomputed if first_products and first_slices < 1 else ''}"
    shares = {_NAMES[kind]: stored[kind] / needed[kind] for kind in needed if stored[kind]}
    return f"{total}   " + ", ".join(name if share == 1 else f"{share:.0%} of {name}" for name, share in shares.items())
