"""The figures of docs/ show what the code does: their files are up to date, and what they show is what runs."""

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron.planner.plan import Plan
from tests.unit.tools.tool import TOOLS, load_tool

TOOL = load_tool("draw_figures")
NAMES = list(TOOL.FIGURES)
PAGES = {TOOLS.parent / "docs" / "fpdt.md": "figures/", TOOLS.parent / "README.md": "docs/figures/"}
LARGEST = 80_000  # bytes


def clock() -> ModuleType:
    """Return the module that simulates the timeline."""
    import figures.clock

    return figures.clock


def content(name: str) -> dict[str, Any]:
    shown: dict[str, Any] = TOOL.FIGURES[name].content()
    return shown


def plan_with(num_chunks: int, chunk_length: int) -> Plan:
    """The timeline's job with other chunks."""
    plan: Plan = TOOL.timeline.plan()
    return plan.with_job(plan.job.at(num_chunks * chunk_length, chunk_length))


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_figure_is_up_to_date(name: str) -> None:
    path = TOOL.FOLDER / f"{name}.svg"
    assert TOOL.text_in(path) == TOOL.text_of(content(name)), "run tools/draw_figures.py"
    assert path.stat().st_size < LARGEST


def test_every_figure_is_in_a_page_and_the_folder_has_no_other_drawings() -> None:
    assert {path.name for path in TOOL.FOLDER.glob("*.svg")} == {f"{name}.svg" for name in NAMES}
    shown = [f"]({folder}{name}.svg)" for name in NAMES for folder in PAGES.values()]
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in NAMES if not any(link in text for link in shown if f"/{name}." in link)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_drawn_the_same_each_time(name: str, tmp_path: Path) -> None:
    for folder in ("once", "twice"):
        assert TOOL.main([name, "--folder", str(tmp_path / folder)]) == 0
    once, twice = (tmp_path / folder / f"{name}.svg" for folder in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    assert TOOL.text_in(once) == TOOL.text_of(content(name))


def test_an_unknown_figure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        TOOL.main(["tile"])
    assert "there is no figure tile; there are layout, tiles, " in capsys.readouterr().err


def test_the_layout_shows_every_token_and_every_head_once() -> None:
    shown = content("layout")
    assert sorted(chain(*shown["tokens_of_rank"])) == list(range(sum(shown["chunk_lengths"])))
    assert list(chain(*shown["heads_of_rank"])) == list(range(8))


def test_the_tiles_copies_are_those_of_the_stream() -> None:
    shown, lanes = content("tiles"), clock()
    num_chunks = len(shown["chunk_lengths"])
    pieces = [piece for piece in lanes.timeline_of(plan_with(num_chunks, 32768), 2) if piece.layer == 1]
    for phase in ("forward", "backward"):
        own = [piece for piece in pieces if piece.phase == phase]
        assert [piece.label for piece in own if piece.kind == lanes.TILE] == [
            "{},{}".format(*entry["tile"]) for entry in shown[phase]
        ]
        assert [piece.label for piece in own if (piece.lane, piece.kind) == (lanes.COPY_IN, lanes.KEYS)] == [
            f"kv {entry['tile'][1]}" for entry in shown[phase] if "kv" in entry["in"]
        ]
        copied = Counter(piece.lane for piece in own if piece.kind == lanes.GRADIENTS)
        assert copied[lanes.COPY_IN] == sum("dkv" in entry["in"] for entry in shown[phase])
        assert copied[lanes.COPY_OUT] == sum("dkv stored" in entry["out"] for entry in shown[phase])


def test_a_lane_does_one_thing_at_a_time_and_a_tile_waits_for_its_keys() -> None:
    lanes = clock()
    pieces = lanes.timeline_of(plan_with(5, 4096), 1)
    for lane in lanes.LANES:
        own = [piece for piece in pieces if piece.lane == lane]
        assert own
        assert all(before.end <= piece.start for before, piece in pairwise(own))
    forward = [piece for piece in pieces if piece.phase == "forward"]
    arrivals = iter([piece for piece in forward if (piece.lane, piece.kind) == (lanes.COPY_IN, lanes.KEYS)])
    for tile in [piece for piece in forward if piece.kind == lanes.TILE]:
        query, key = tile.label.split(",")
        if query != key:
            assert next(arrivals).end <= tile.start


def test_the_timeline_computes_as_long_as_the_planner_estimates() -> None:
    lanes, plan = clock(), TOOL.timeline.plan()
    assert plan.overlaps_with_link
    pieces = lanes.timeline_of(plan, num_blocks=3)
    speed = plan.speed
    forward, backward = speed.forward - speed.forward_waiting, speed.backward - speed.backward_waiting
    for phase, estimated in (("forward", forward), ("backward", backward)):
        own = [piece for piece in pieces if (piece.lane, piece.layer, piece.phase) == (lanes.COMPUTE, 2, phase)]
        computed, elapsed = sum(piece.end - piece.start for piece in own), own[-1].end - own[0].start
        assert computed == pytest.approx(estimated / plan.job.model.num_layers, rel=1e-9)
        assert elapsed < 1.04 * computed


@pytest.mark.parametrize("num_chunks, exposed", [(1, 0.5), (3, 0.0), (5, 0.0)])
def test_half_of_the_all_to_alls_of_an_only_chunk_is_exposed_and_none_of_several(
    num_chunks: int, exposed: float
) -> None:
    lanes, plan = clock(), plan_with(num_chunks, 32768)
    seconds = replace(lanes.Seconds.of(plan), per_byte=0.0)
    own = [piece for piece in lanes.timeline_of(plan, 3, seconds) if piece.layer == 2]
    for phase in ("forward", "backward"):
        computing = [piece for piece in own if (piece.lane, piece.phase) == (lanes.COMPUTE, phase)]
        exchanged = sum(p.end - p.start for p in own if (p.lane, p.phase) == (lanes.ALL_TO_ALL, phase))
        waited = sum(after.start - before.end for before, after in pairwise(computing))
        assert waited == pytest.approx(exposed * exchanged, abs=1e-9)


def test_copies_slower_than_the_arithmetic_show_in_the_timeline() -> None:
    seconds = clock().Seconds.of(TOOL.timeline.plan())
    slower = replace(seconds, per_byte=10 * seconds.per_byte)
    assert share_computing(slower) < 0.7 < 0.95 < share_computing(seconds)


def share_computing(seconds: Any) -> float:
    """Of the second block's backward pass, the share in which something computes."""
    lanes = clock()
    own = [
        piece
        for piece in lanes.timeline_of(TOOL.timeline.plan(), 3, seconds)
        if (piece.lane, piece.layer, piece.phase) == (lanes.COMPUTE, 2, "backward")
    ]
    return float(sum(piece.end - piece.start for piece in own) / (own[-1].end - own[0].start))


def test_a_tiles_copies_are_hidden_from_the_length_of_a_chunk_on_that_the_page_names() -> None:
    shown = content("copies")
    for name, longest in (("gpt-6.7b", 14000), ("llama-8b", 14000 / 4)):
        hiding = [chunk * max(ratios) for chunk, ratios in zip(shown["chunks"], shown["ratios"][name], strict=True)]
        assert hiding == [pytest.approx(longest, rel=0.02)] * len(hiding)


def test_gpu_memory_is_the_same_at_every_length_with_offloading_alone() -> None:
    on_gpu = content("memory")["on_gpu"]
    offloaded = on_gpu.pop("FPDT, chunks on the host")
    assert max(offloaded) < 1.01 * min(offloaded)
    assert [way for way, values in on_gpu.items() if values[-1] < 5 * offloaded[-1]] == []
