"""Figures of memory by sequence length, and of copy time over compute time, from the planner's estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from figures.clock import Seconds
from figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure
from megatron.config import Recompute
from megatron.planner.hardware import GB, GIB, GPUS, Machines
from megatron.planner.job import HALF, SUM, Job
from megatron.planner.memory import FRAGMENTATION, OUTSIDE_TORCH
from megatron.planner.models import named_model
from megatron.planner.plan import Plan

MODEL, GPU, NUM_GPUS, HOST_GIB, CHUNK = "llama-8b", "H200", 8, 1900.0, 65536
LENGTHS = [2**exponent for exponent in range(15, 24)]
OFFLOADED, ON_GPU = "FPDT, chunks on the host", "FPDT, chunks on the GPU (upper bound)"
KEPT, RECOMPUTED = "without FPDT", "without FPDT, blocks recomputed"
FROM_HOST = "without FPDT, recomputed, inputs on the host"
STYLES = {
    OFFLOADED: (BLUE, "o"), ON_GPU: (GREEN, "s"), KEPT: (RED, "^"), RECOMPUTED: (ORANGE, "v"), FROM_HOST: (PURPLE, "D"),
}  # fmt: skip
CHUNKS = [2**exponent for exponent in range(11, 18)]
COPIED_MODELS = {"gpt-6.7b": "GPT 6.7B, 32 key/value heads", "llama-8b": "Llama-3 8B, 8 key/value heads"}
COPIED_COLORS = {"gpt-6.7b": ORANGE, "llama-8b": BLUE}


def content() -> dict[str, Any]:
    """Return GiB per GPU by sequence length: on the GPU, including memory outside torch, and on the host."""
    plans = [with_chunks_on_host(MODEL, length, CHUNK, NUM_GPUS) for length in LENGTHS]
    ways = {
        OFFLOADED: plans,
        KEPT: [without_fpdt(plan, activations="kept") for plan in plans],
        RECOMPUTED: [without_fpdt(plan, activations="recomputed") for plan in plans],
        FROM_HOST: [without_fpdt(plan, activations="recomputed from the host") for plan in plans],
    }
    on_gpu = {way: [_gib(plan.memory.gpu_with_overhead) for plan in each] for way, each in ways.items()}
    on_gpu[ON_GPU] = [_gib(_with_chunks_on_the_gpu(plan)) for plan in plans]
    machines = plans[0].machines
    return {
        "model": MODEL, "gpu": GPU, "gpus": NUM_GPUS, "chunk": CHUNK, "lengths": LENGTHS,
        "gpu_has": round(machines.gpu.memory_gib, 1), "host_has": _gib(machines.host_bytes_per_gpu),
        "on_gpu": {way: on_gpu[way] for way in STYLES},
        "on_host": {way: [_gib(plan.memory.host) for plan in ways[way]] for way in (OFFLOADED, FROM_HOST)},
    }  # fmt: skip


def with_chunks_on_host(name: str, length: int, chunk_length: int, num_gpus: int) -> Plan:
    """Plan a model with FPDT and offloading: every product recomputed, every block's input saved."""
    model, vocabulary = named_model(name, length)
    chunk_length = min(chunk_length, length)
    job = Job(model, vocabulary, num_gpus, chunk_length, num_gpus, recompute=Recompute.ALL, checkpoint_interval=1)
    gpu = GPUS[GPU]
    return Plan(job, Machines(gpu, num_gpus, num_gpus, HOST_GIB), gpu.fastest)


def without_fpdt(plan: Plan, **changes: Any) -> Plan:
    job = plan.job
    return plan.with_job(replace(job, streamed=False, chunk_length=job.model.seq_length, **changes))


def _with_chunks_on_the_gpu(plan: Plan) -> float:
    """Return the peak bytes of the GPU if the chunks that are stored on the host were on the GPU."""
    return (plan.memory.gpu + plan.memory.host_chunks) * FRAGMENTATION + OUTSIDE_TORCH


def _gib(num_bytes: float) -> float:
    return round(num_bytes / GIB, 2)


def draw(content: dict[str, Any]) -> Any:
    """Draw GPU and host memory side by side."""
    figure, panels = new_figure(13.5, 6, columns=2)
    for axes, where, has, what in (
        (panels[0], "on_gpu", content["gpu_has"], f"memory of an {content['gpu']}"),
        (panels[1], "on_host", content["host_has"], f"a GPU's share of {HOST_GIB:,.0f} GiB"),
    ):
        axes.axhline(has, color=GREY, linestyle="--", linewidth=1.5)
        axes.text(content["lengths"][0], has * 1.06, what, color=GREY, fontsize=11)
        for way, values in content[where].items():
            color, marker = STYLES[way]
            axes.plot(content["lengths"], values, color=color, marker=marker, linewidth=2, label=way)
        label_lengths(axes, content["lengths"], "tokens of the sequence")
    panels[0].set(title="GPU memory", ylabel="GiB per GPU", yscale="log", ylim=(10, 1000))
    panels[1].set(title="host memory", ylabel="GiB per GPU", yscale="log", ylim=(1, 1000))
    for axes in panels:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    about = "{model} on {gpus} {gpu} that share one sequence, ZeRO-3, chunks of {chunk:,} tokens".format(**content)
    figure.suptitle(about, fontsize=13)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def label_lengths(axes: Any, lengths: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def _short(length: int) -> str:
    return f"{length // 2**20}M" if length >= 2**20 else f"{length // 2**10}K"


def copies_content() -> dict[str, Any]:
    """Return the ratio of a tile's copy time to its compute time, by chunk length."""
    ratios = {
        name: [_copies_over_compute(with_chunks_on_host(name, 8 * chunk, chunk, 1)) for chunk in CHUNKS]
        for name in COPIED_MODELS
    }
    return {"gpu": GPU, "chunks": CHUNKS, "ratios": ratios}


def _copies_over_compute(plan: Plan) -> list[float]:
    """Return the ratio for a full tile forward, which loads kv, and backward, which also loads dkv."""
    shape = plan.job.shape
    elements = shape.key_value_elements / shape.layout.num_chunks
    link = plan.machines.link.to_gpu * GB
    copied = (elements * HALF, elements * (HALF + SUM))
    compute = Seconds.of(plan).tile
    return [round(num_bytes / link / seconds, 3) for num_bytes, seconds in zip(copied, compute, strict=True)]


def draw_copies(content: dict[str, Any]) -> Any:
    """Draw the ratio by chunk length, one line for each model and pass."""
    figure, axes = new_figure(9.5, 5.6)
    for name, ratios in content["ratios"].items():
        for phase, style, values in zip(("forward", "backward"), ("-", "--"), zip(*ratios, strict=True), strict=True):
            label = f"{COPIED_MODELS[name]}, {phase}"
            axes.plot(content["chunks"], values, style, color=COPIED_COLORS[name], marker="o", linewidth=2, label=label)
    axes.axhline(1, color=GREY, linewidth=1.5)
    axes.text(content["chunks"][-1], 1.08, "above: the GPU waits for copies", ha="right", va="bottom", color=GREY)
    axes.text(content["chunks"][-1], 0.92, "below: copies are hidden behind compute", ha="right", va="top", color=GREY)
    label_lengths(axes, content["chunks"], "tokens of a chunk, over all ranks")
    axes.set(yscale="log", ylabel="copy time / compute time", title=f"one tile on {content['gpu']}s")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False)
    return figure
