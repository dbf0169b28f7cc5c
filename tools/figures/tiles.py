"""Figures of the attention tiles of a sequence in order of execution, from ChunkPlan, with and without documents."""

from __future__ import annotations

from itertools import accumulate, combinations_with_replacement, pairwise
from typing import Any

from figures.style import (
    BLUE,
    GREY,
    PALE_GREY,
    PALE_ORANGE,
    PALE_PURPLE,
    PALE_SKY,
    bare,
    box,
    legend_of,
    new_figure,
)
from megatron.core.documents import Documents, Span
from megatron.fpdt.attention_tiles import backward_tile_inputs
from megatron.fpdt.plan import Tile, chunk_plan

CHUNK_LENGTHS = (8,) * 5
DOCUMENT_STARTS = (0, 13, 29)

COLORS = {
    "own": PALE_SKY,
    "kv": PALE_ORANGE,
    "kv dkv": PALE_PURPLE,
    "left out": PALE_GREY,
}
MEANINGS = {
    "own": "diagonal: its keys and values are on the GPU",
    "kv": "keys and values (kv) are copied in",
    "kv dkv": "kv and the sum of their gradients so far (dkv) are copied in",
    "left out": "not in the plan: neither computed nor loaded",
}


def content() -> dict[str, Any]:
    """Return the tiles of a causal sequence."""
    return _content(None)


def content_with_documents() -> dict[str, Any]:
    """Return the tiles that documents leave."""
    return _content(DOCUMENT_STARTS)


def _content(starts: tuple[int, ...] | None) -> dict[str, Any]:
    documents = Documents.from_starts([starts], sum(CHUNK_LENGTHS)) if starts else None
    plan = chunk_plan(CHUNK_LENGTHS, documents)
    return {
        "chunk_lengths": list(CHUNK_LENGTHS),
        "document_starts": list(starts or ()),
        "forward": [_entry(tile, _forward_inputs(tile)) for row in plan.forward_rows() for tile in row],
        "backward": [
            _entry(tile, _backward_inputs(tile), _result(tile, row)) for row in plan.backward_rows() for tile in row
        ],
    }


def _forward_inputs(tile: Tile) -> list[str]:
    return [] if tile.is_diagonal else ["kv"]


def _backward_inputs(tile: Tile) -> list[str]:
    """Return the names of the chunks that the stream loads for a tile."""
    kv, dkv = (dict.fromkeys([tile.key], name) for name in ("kv", "dkv"))
    return [] if tile.is_diagonal else backward_tile_inputs(tile, kv, dkv)  # type: ignore[arg-type,return-value]


def _result(tile: Tile, row: list[Tile]) -> str:
    """Say what happens to dk and dv of a backward tile."""
    if tile.is_diagonal:
        return "dk, dv final"
    return "dkv stays" if tile is row[-1] else "dkv stored"


def _entry(tile: Tile, inputs: list[str], *out: str) -> dict[str, Any]:
    """Describe a tile: its inputs that are copied in, its results, and the regions that documents leave."""
    spans = [(*_placed(region.queries, tile.queries), *_placed(region.keys, tile.keys)) for region in tile.regions]
    return {"tile": [tile.query, tile.key], "in": inputs, "out": out, "regions": spans}


def _placed(span: Span, tile: Span) -> Span:
    """Return the span of a region, which counts from the beginning of its tile, as one of the whole chunk."""
    return tile[0] + span[0], min(tile[0] + span[1], tile[1], CHUNK_LENGTHS[0])


def draw(content: dict[str, Any]) -> Any:
    """Draw both passes side by side, as the lower triangle of queries against keys."""
    figure, panels = new_figure(12.5, 7.3, columns=2)
    for axes, phase, order in (
        (panels[0], "forward", "query chunks ascending"),
        (panels[1], "backward", "query chunks descending"),
    ):
        _draw_pass(axes, content, phase, f"{phase}: {order}")
    kinds = {" ".join(entry["in"]) or "own" for phase in ("forward", "backward") for entry in content[phase]}
    kinds |= {"left out"} if content["document_starts"] else set()
    legend_of(figure, {MEANINGS[k]: COLORS[k] for k in MEANINGS if k in kinds}, loc="outside lower center", ncols=2)
    return figure


def _draw_pass(axes: Any, content: dict[str, Any], phase: str, title: str) -> None:
    lengths, documents = content["chunk_lengths"], content["document_starts"]
    starts = list(accumulate(lengths, initial=0))
    total = starts[-1]
    bare(axes, total, total, "")
    axes.set(xlim=(-5.5, total + 0.1), ylim=(total + 0.1, -6))
    axes.set_title(title, loc="center")
    for i, j in combinations_with_replacement(range(len(lengths)), 2) if documents else ():
        box(axes, (starts[i], starts[j]), (lengths[i], lengths[j]), COLORS["left out"])
    for number, entry in enumerate(content[phase], 1):
        i, j = entry["tile"]
        _draw_tile(axes, (starts[j], starts[i]), number, entry, notes=not documents)
    for number, (first, end) in enumerate(pairwise(starts)):
        middle = (first + end) / 2
        axes.text(middle, -1.3, str(number), ha="center", va="center")
        axes.text(-1.3, middle, str(number), ha="center", va="center")
    axes.text(total / 2, -4, "key/value chunk", ha="center", va="center")
    axes.text(-4, total / 2, "query chunk", ha="center", va="center", rotation=90)
    for number, (first, end) in enumerate(pairwise([*documents, total])):
        axes.plot([first, end, end, first, first], [first, first, end, end, first], color=BLUE, linewidth=2)
        axes.text(end - 0.5, first + 0.5, f"document {number}", ha="right", va="top", color=BLUE, fontsize=11)


def _draw_tile(axes: Any, corner: tuple[int, int], number: int, entry: dict[str, Any], notes: bool) -> None:
    """Draw a tile: its regions, its number in order of execution, and its copies."""
    from matplotlib.patches import Polygon, Rectangle

    (x, y), (i, j), size = corner, entry["tile"], CHUNK_LENGTHS[0]
    color = COLORS[" ".join(entry["in"]) or "own"]
    axes.add_patch(Rectangle(corner, size, size, facecolor="white", edgecolor=GREY, linewidth=0.8))
    for q0, q1, k0, k1 in entry["regions"]:
        corners = [(k0, q0), (k1, q1), (k0, q1)] if i == j else [(k0, q0), (k1, q0), (k1, q1), (k0, q1)]
        shape = [(x + key, y + query) for key, query in corners]
        axes.add_patch(Polygon(shape, facecolor=color, edgecolor=GREY, linewidth=0.5))
    q0, q1, k0, k1 = max(entry["regions"], key=lambda region: (region[1] - region[0]) * (region[3] - region[2]))
    across, down = (0.3, 0.62) if i == j else (0.5, 0.3 if notes else 0.5)
    place = x + k0 + across * (k1 - k0), y + q0 + down * (q1 - q0)
    axes.text(*place, str(number), ha="center", va="center", fontsize=16, fontweight="bold")
    if notes:
        lines = [*[f"{'+'.join(entry['in'])} {j}"] * bool(entry["in"]), *entry["out"]]
        across, down = (0.4, 0.88) if i == j else (0.5, 0.74)
        axes.text(x + across * size, y + down * size, "\n".join(lines), ha="center", va="center", fontsize=9.5)
