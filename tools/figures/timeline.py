"""Figure of the timeline of a block, forward and backward, simulated on the real schedule (figures.clock)."""

from __future__ import annotations

from typing import Any

from figures.clock import (
    AFTER,
    ALL_TO_ALL,
    BEFORE,
    COMPUTE,
    GRADIENTS,
    HIDDEN,
    KEYS,
    LANES,
    LSE,
    OUTPUT,
    TILE,
    Piece,
    timeline_of,
)
from figures.style import (
    GREEN,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    PALE_PURPLE,
    PALE_SKY,
    PURPLE,
    RED,
    SKY,
    legend_of,
    new_figure,
)
from megatron.config import Recompute
from megatron.planner.hardware import GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.models import named_model
from megatron.planner.plan import Plan

MODEL, GPU, RANKS, LENGTH, CHUNK = "gpt-6.7b", "H200", 2, 131072, 32768
BLOCK = 2  # of three, so that it has neighbors
COLORS = {
    BEFORE: SKY, AFTER: PALE_SKY, TILE: PALE_ORANGE, ALL_TO_ALL: RED, HIDDEN: GREEN, OUTPUT: PALE_GREEN,
    LSE: PALE_GREEN, KEYS: PURPLE, GRADIENTS: PALE_PURPLE,
}  # fmt: skip
MEANINGS = {
    BEFORE: "before: norm, projection, RoPE",
    AFTER: "after: projection, norm, MLP",
    TILE: "attention tile (query, key chunk)",
    ALL_TO_ALL: "all-to-all",
    HIDDEN: "x, y, dx, dy",
    OUTPUT: "o and lse",
    KEYS: "kv: keys and values",
    GRADIENTS: "dkv: their gradients",
}


def plan() -> Plan:
    """Return the plan of the job whose block is shown."""
    model, vocabulary = named_model(MODEL, LENGTH)
    job = Job(
        model, vocabulary, num_gpus=RANKS, chunk_length=CHUNK, sequence_parallel_size=RANKS, recompute=Recompute.ALL,
        checkpoint_interval=1,
    )  # fmt: skip
    gpu = GPUS[GPU]
    return Plan(job, Machines(gpu, RANKS, RANKS, host_memory_gib=1900.0), gpu.fastest)


def content() -> dict[str, Any]:
    """Return what runs on each lane while the compute lane runs the block, in milliseconds from its start."""
    pieces = timeline_of(plan(), num_blocks=BLOCK + 1)
    about = {"model": MODEL, "gpu": GPU, "ranks": RANKS, "tokens": LENGTH, "chunk": CHUNK}
    return about | {phase: _window(pieces, phase) for phase in ("forward", "backward")}


def _window(pieces: list[Piece], phase: str) -> list[Any]:
    own = [piece for piece in pieces if (piece.lane, piece.layer, piece.phase) == (COMPUTE, BLOCK, phase)]
    begin, end = own[0].start, own[-1].end
    return [
        [piece.lane, piece.kind, piece.label, *(round(1e3 * (at - begin), 2) for at in (start, stop))]
        for piece in pieces
        if (start := max(piece.start, begin)) < (stop := min(piece.end, end))
    ]


def draw(content: dict[str, Any]) -> Any:
    """Draw one lane for compute and one for each kind of copy, for both passes."""
    figure, panels = new_figure(14, 8, rows=2)
    about = "{model}, {tokens:,} tokens in chunks of {chunk:,}, on one of {ranks} {gpu}".format(**content)
    for axes, phase in zip(panels, ("forward", "backward"), strict=True):
        _draw_pass(axes, content[phase])
        axes.set_title(f"{phase} pass of one block: {about}", loc="left")
        axes.set_xlabel("milliseconds")
    legend_of(figure, {MEANINGS[kind]: COLORS[kind] for kind in MEANINGS}, loc="outside lower center", ncols=4)
    return figure


def _draw_pass(axes: Any, pieces: list[Any]) -> None:
    end = max(piece[-1] for piece in pieces)
    for row, lane in enumerate(LANES):
        axes.broken_barh([(0, end)], (row - 0.42, 0.84), facecolor=PALE_GREY, alpha=0.5)
        for kind in COLORS:
            spans = [(start, stop - start) for at, of, _, start, stop in pieces if (at, of) == (lane, kind)]
            if spans:
                axes.broken_barh(spans, (row - 0.42, 0.84), facecolor=COLORS[kind], edgecolor="white", linewidth=0.5)
    for lane, kind, label, start, stop in pieces:
        if kind == TILE or (kind == KEYS and stop - start > 0.028 * end):
            axes.text((start + stop) / 2, LANES.index(lane), label, ha="center", va="center", fontsize=11)
    axes.set(xlim=(0, end), ylim=(len(LANES) - 0.5, -0.5), yticks=range(len(LANES)), yticklabels=LANES)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
