"""The figure at the head of the README: GPU memory and speed by sequence length, measured and estimated.

The measured values are the rows of docs/performance.md.
"""

from __future__ import annotations

from typing import Any

from figures.memory import label_lengths, with_chunks_on_host, without_fpdt
from figures.style import BLUE, GREY, INK, ORANGE, PURPLE, RED, new_figure
from megatron.planner.hardware import GIB
from megatron.planner.plan import Plan

MODEL, NUM_GPUS, CHUNK = "llama-8b", 4, 131072
LENGTHS = [2**exponent for exponent in range(16, 22)]
FPDT, PLAIN, ALST, SAVED = (
    "FPDT",
    "without FPDT, checkpoints on the host",
    "ALST",
    "without FPDT, all activations saved",
)
UPIPE = "UPipe, published, 8 H100"
COLORS = {FPDT: BLUE, PLAIN: PURPLE, ALST: ORANGE, SAVED: RED, UPIPE: GREY}
MARKERS = {FPDT: "o", PLAIN: "D", ALST: "v", SAVED: "", UPIPE: "s"}
# GiB per GPU. FPDT: one rank of four, simulated, besides the chunks that were set to stay on the GPU.
MEASURED_MEMORY = {
    FPDT: {131072: 37.95, 524288: 40.32, 1048576: 40.27, 2097152: 40.3},
    PLAIN: {65536: 36.9, 131072: 40.6},
    ALST: {65536: 40.3, 131072: 46.2},
}
# Tokens/s/GPU of whole optimizer steps on four H200. FPDT uses free GPU memory here.
MEASURED_SPEED = {
    FPDT: {65536: 5022, 131072: 3414, 262144: 2035, 2097152: 301},
    PLAIN: {65536: 4032, 131072: 2712},
    ALST: {65536: 3431, 131072: 2471},
    UPIPE: {1048576: 475, 2097152: 246},
}


def content() -> dict[str, Any]:
    """Return GiB per GPU and tokens/s/GPU by sequence length."""
    plans = [with_chunks_on_host(MODEL, length, CHUNK, NUM_GPUS) for length in LENGTHS]
    estimated = {
        FPDT: plans,
        PLAIN: [without_fpdt(plan, activations="recomputed from the host") for plan in plans],
        SAVED: [without_fpdt(plan, activations="kept") for plan in plans],
    }
    return {
        "lengths": LENGTHS,
        "gpu_has": round(plans[0].machines.gpu.memory_gib, 1),
        "estimated_memory": {way: [_gib(plan) for plan in each] for way, each in estimated.items()},
        "measured_memory": {way: sorted(values.items()) for way, values in MEASURED_MEMORY.items()},
        "measured_speed": {way: sorted(values.items()) for way, values in MEASURED_SPEED.items()},
    }


def _gib(plan: Plan) -> float:
    return round(plan.memory.gpu / GIB, 2)


def draw(content: dict[str, Any]) -> Any:
    """Draw memory on the left and speed on the right."""
    figure, (memory, speed) = new_figure(13.5, 5.4, columns=2)
    memory.axhline(content["gpu_has"], color=GREY, linestyle="--", linewidth=1.5)
    memory.text(content["lengths"][-1], content["gpu_has"] * 1.05, "memory of an H200", ha="right", color=GREY)
    for way, values in content["estimated_memory"].items():
        memory.plot(content["lengths"], values, color=COLORS[way], linewidth=2, alpha=0.6)
    _mark(memory, content["measured_memory"], "none")
    memory.set(title="GPU memory (GiB): points measured, lines estimated", yscale="log", ylim=(20, 500))
    memory.set_yticks([20, 40, 80, 160, 320], ["20", "40", "80", "160", "320"])
    _mark(speed, content["measured_speed"], "-")
    for length, value in content["measured_speed"][FPDT]:
        speed.annotate(f"{value:,}", (length, value), (9, 5), textcoords="offset points", color=INK)
    speed.set(title="speed (tokens/s per GPU), measured", yscale="log", ylim=(150, 9000))
    speed.set_yticks([200, 500, 1000, 2000, 5000], ["200", "500", "1,000", "2,000", "5,000"])
    for axes in (memory, speed):
        axes.minorticks_off()
        axes.margins(x=0.1)
        label_lengths(axes, content["lengths"], "tokens of the sequence")
    figure.suptitle("Whole optimizer steps of Llama-3-8B on four H200, one sequence over the four", fontsize=13)
    ways = [memory.plot([], [], marker=MARKERS[way], color=COLORS[way], label=way)[0] for way in COLORS]
    figure.legend(handles=ways, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _mark(axes: Any, measured: dict[str, Any], line: str) -> None:
    """Mark what was measured, joined by a line if there is to be one."""
    for way, points in measured.items():
        axes.plot(*zip(*points, strict=True), marker=MARKERS[way], linestyle=line, color=COLORS[way], markersize=7)
