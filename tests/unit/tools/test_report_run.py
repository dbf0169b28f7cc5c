"""The report of a run: one file that needs nothing else, and what its cards show."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.logging.writers import TensorBoardWriter
from tests.unit.logging.reported_runs import record, write_events, write_log
from tests.unit.tools.tool import load_tool, run_tool

TOOL = load_tool("report_run")
MS = 1e3  # microseconds


def shown(page: Path) -> dict[str, Any]:
    """Return the cards of a page by their titles."""
    (data,) = re.findall(r'<script type="application/json" id="report">(.*)</script>', page.read_text())
    return {card["title"]: card for card in json.loads(data)["cards"]}


def write_trace(path: Path, events: list[tuple[str, str, float, float]]) -> None:
    fields = ("cat", "name", "ts", "dur")
    text = json.dumps({"traceEvents": [{"ph": "X", **dict(zip(fields, event, strict=True))} for event in events]})
    path.write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with everything in it."""
    folder = tmp_path / "<run>"
    write_events(folder / "events", [record(i, grad_norm=float("nan") if i == 3 else 1.0) for i in range(1, 9)])
    writer = TensorBoardWriter(str(folder / "events"))
    writer.write(8, {"memory/gpu/weights": 2.0, "memory/gpu/optimizer_states": 3.0, "plan/peak_gpu_gib": 3.5})
    writer.close()
    (folder / "save/global_step8").mkdir(parents=True)
    config = {"training": {"train_iters": 8, "lr": 0.5}, "given": ["lr"], "notes": ["</script>"]}
    (folder / "save/global_step8/config.json").write_text(json.dumps(config))
    cell = {"length": 64, "depth": 0.5, "accuracy": 1.0, "probability": 0.9}
    (folder / "needle.json").write_text(json.dumps({"trials": 2, "cells": [cell]}))
    (folder / "loss.json").write_text(json.dumps({"contexts": [{"context": 64, "loss": 5.0}]}))
    (folder / "rank0-iterations-2-2.summary.json").write_text('{"seconds_by_kind": {"waiting": 0, "other": 2.0}}')
    write_trace(
        folder / "rank0-iterations-2-2.trace.json.gz",
        [
            ("kernel", "flash_fwd", 100 * MS, 10 * MS),
            ("kernel", "flash_fwd", 110.001 * MS, 10 * MS),  # no visible gap
            ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 130 * MS, 5 * MS),
            ("user_annotation", "attention", 0, 1),  # of the host
        ],
    )
    return folder


def test_a_page_shows_all_that_a_folder_holds_and_needs_nothing_else(run: Path) -> None:
    assert run_tool("report_run", run) == 0
    page = run / "report.html"
    text = page.read_text()
    assert "<h1>&lt;run&gt;</h1>" in text
    assert re.findall(r'(?:src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg")', text) == []
    cards = shown(page)
    assert [
        title for title, card in cards.items() if not any(map(card.get, ("series", "rows", "lanes", "cells")))
    ] == []
    assert [place for place, _ in cards["Gradient norm"]["series"][0]["points"]] == [1, 2, 4, 5, 6, 7, 8]
    assert len(cards["Validation loss by position"]["series"]) == 4
    assert cards["Memory by owner, rank 0"]["rows"] == [
        {"name": "GPU", "parts": [["weights", 2.0], ["optimizer states", 3.0]]}
    ]
    assert cards["Plan and measured"]["rows"] == [["peak GPU memory (GiB)", "3.5", "7.0", "2.00"]]
    assert cards["Timeline of the profiled steps"]["lanes"] == [
        {"name": "attention forward", "spans": [[0.0, pytest.approx(0.020001)]]},
        {"name": "copies in", "spans": [[pytest.approx(0.03), pytest.approx(0.035)]]},
    ]
    assert cards["Profiled time by kind"]["rows"] == [{"name": "other", "parts": [["other", 2.0]]}]
    assert cards["Needles found"]["cells"] == [[64, 0.5, 1.0, 0.9]]
    assert cards["Configuration"]["rows"] == [
        ["training", "train_iters", "8", False], ["training", "lr", "0.5", True]
    ]  # fmt: skip


def test_a_log_alone_has_curves_and_names_the_flags_of_the_rest(tmp_path: Path) -> None:
    write_log(tmp_path / "a.log", [record(1), record(2)])
    assert run_tool("report_run", tmp_path / "a.log", "--output", tmp_path / "out/a.html") == 0
    cards = shown(tmp_path / "out/a.html")
    assert cards["Loss"]["series"][0]["points"] == [[1, 8.0], [2, 8.0]]
    for title, flag in (
        ("Memory by owner, rank 0", "--tensorboard-dir"),
        ("Timeline of the profiled steps", "--profile"),
    ):
        assert flag in cards[title]["empty"]


def test_a_long_curve_keeps_its_spikes_and_its_end() -> None:
    import report.cards as cards

    points = [(i, 0.0) for i in range(100_000)]
    points[54_321] = (54_321, 9.0)
    few = cards.thinned(points)
    assert len(few) <= cards.MOST_POINTS + 1
    assert {points[54_321], points[-1]} <= set(few)
