"""The cards of a report: what each shows, as JSON that report.js draws, and what would fill it where it is empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.logging.run_history import MEMORY, PLANNED, RunHistory
from report.sources import configuration_of, losses_by_context_of, needles_of, profile_of, timeline_of

Card = dict[str, Any]
Points = Mapping[Any, float]

MOST_POINTS = 1200  # of a curve; more are thinned to the lowest and highest of each stretch
MOST_EVALUATIONS = 4  # whose losses by position are drawn
EVENTS = "--tensorboard-dir DIR, which stores more than the log does"
# Title, unit and series (name in `SCALARS` to its label) of the curves over iterations.
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Gradient norm", "", {"grad_norm": "before clipping"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Speed", "tokens/s/GPU", {"tokens_per_second_per_gpu": "tokens/s/GPU"}),
    ("Share of the GPU's peak", "%", {"mfu": "MFU", "hfu": "HFU"}),
    ("Memory", "GiB", {"peak_gpu_gib": "peak of the GPU", "host_gib": "process", "host_pool_gib": "host pool"}),
)
MEASURED = {  # name of a planned value to the title, unit and digits of its row
    "milliseconds": ("time of a step", "s", 2),
    "tokens_per_second_per_gpu": ("speed", "tokens/s/GPU", 0),
    "mfu": ("MFU", "%", 1),
    "peak_gpu_gib": ("peak GPU memory", "GiB", 1),
    "host_gib": ("host memory", "GiB", 1),
}
SCALES = {"mfu": 100.0, "hfu": 100.0, "milliseconds": 1e-3}


def cards_of(path: Path, run: RunHistory) -> list[Card]:
    """Return the cards of a run, in the order of the page."""
    configuration = configuration_of(path)
    return [
        _losses(run),
        _positions(run),
        *(_curve(run, *curve) for curve in CURVES),
        _owners(run),
        _plan(run),
        _timeline(path),
        _kinds(path),
        *_needles(path),
        _contexts(path),
        _configuration(configuration),
    ]


def tiles_of(run: RunHistory, path: Path) -> list[dict[str, str]]:
    """Return label and value of the numbers at the top: the latest of each."""
    configuration = configuration_of(path) or {}
    iterations = (configuration.get("training") or {}).get("train_iters")
    shown: tuple[tuple[str, Points, Callable[[float], str]], ...] = (
        ("tokens", run.train("consumed_tokens"), _short),
        ("loss", run.train("loss"), "{:.4f}".format),
        ("validation loss", run.series.get("validation/loss", {}), "{:.4f}".format),
        ("seconds per step", _scaled(run, "milliseconds"), "{:,.2f}".format),
        ("tokens/s/GPU", run.train("tokens_per_second_per_gpu"), "{:,.0f}".format),
        ("MFU", _scaled(run, "mfu"), "{:.1f}%".format),
        ("peak GPU memory", run.train("peak_gpu_gib"), "{:.1f} GiB".format),
        ("host memory", run.train("host_gib"), "{:.1f} GiB".format),
        ("hours of training", run.hours(), "{:,.2f}".format),
    )
    last = max((max(values) for values in run.series.values() if values), default=0)
    steps = f"{last:,} of {iterations:,}" if iterations and iterations >= last else f"{last:,}"
    tiles = [{"label": "iteration", "value": steps}]
    return tiles + [{"label": label, "value": form(_last(values))} for label, values, form in shown if values]


def _losses(run: RunHistory) -> Card:
    series = [_series("training", run.train("loss"))]
    series += [_series(part, run.series.get(f"{part}/loss", {}), dots=True) for part in ("validation", "test")]
    marks = [
        {"label": label, "iterations": run.marks(counter)}
        for counter, label in (("skipped_iterations", "skipped"), ("nan_iterations", "not finite"))
    ]
    return {**_lines("Loss", "nats per token", series), "marks": [mark for mark in marks if mark["iterations"]]}


def _curve(run: RunHistory, title: str, unit: str, names: Mapping[str, str]) -> Card:
    series = [_series(label, _scaled(run, name)) for name, label in names.items()]
    needs = "a GPU, or --peak-tflops" if "mfu" in names else "the next line of the log"
    return _lines(title, unit, series, needs)


def _positions(run: RunHistory) -> Card:
    """Return the losses by position of some evaluations, from the first to the last."""
    evaluations = run.position_history()
    iterations = sorted(evaluations)
    last = len(iterations) - 1
    chosen = sorted(
        {iterations[round(i * last / (MOST_EVALUATIONS - 1))] for i in range(MOST_EVALUATIONS) if iterations}
    )
    return {
        "kind": "steps",
        "title": "Validation loss by position",
        "unit": "nats per token",
        "series": [
            {
                "name": f"iteration {iteration:,}",
                "points": [[bucket.first, bucket.end, bucket.loss] for bucket in evaluations[iteration]],
            }
            for iteration in chosen
        ],
        "empty": "--log-loss-by-position powers-of-two, with --eval-interval",
    }


def _owners(run: RunHistory) -> Card:
    """Return a stacked bar for the GPU and one for the host."""
    bars: dict[str, list[list[Any]]] = {}
    for name, values in run.series.items():
        if name.startswith(MEMORY):
            place, owner = name.removeprefix(MEMORY).split("/", 1)
            bars.setdefault(place.replace("gpu", "GPU"), []).append([owner.replace("_", " "), _last(values)])
    rows = [{"name": place, "parts": parts} for place, parts in bars.items()]
    return {**_bars("Memory by owner, rank 0", "GiB", rows, EVENTS), "stacked": True}


def _plan(run: RunHistory) -> Card:
    rows = []
    for name, (title, unit, digits) in MEASURED.items():
        planned, measured = run.series.get(f"{PLANNED}{name}", {}), run.train(name)
        if planned and measured:
            values = [_last(each) * SCALES.get(name, 1.0) for each in (planned, measured)]
            ratio = values[1] / values[0] if values[0] else 0.0
            rows.append([f"{title} ({unit})", *(f"{value:,.{digits}f}" for value in values), f"{ratio:.2f}"])
    return {
        "kind": "table",
        "title": "Plan and measured",
        "head": ["", "planned", "measured", "measured / planned"],
        "rows": rows,
        "empty": f"a GPU in bf16 or fp16, which the planner covers, and {EVENTS}",
    }


def _timeline(path: Path) -> Card:
    lanes = timeline_of(path) or {}
    return {
        "kind": "timeline",
        "title": "Timeline of the profiled steps",
        "unit": "s",
        "lanes": [{"name": name, "spans": spans} for name, spans in lanes.items()],
        "empty": "--profile --profile-step-start 10 --profile-step-end 11",
        "wide": True,
    }


def _kinds(path: Path) -> Card:
    """Return the seconds of the last profile, a bar for each kind, the longest first."""
    seconds = (profile_of(path) or {}).get("seconds_by_kind", {})
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    rows = [{"name": kind, "parts": [[kind, value]]} for kind, value in ordered if value > 0]
    return _bars("Profiled time by kind", "s", rows, "--profile, as for the timeline")


def _needles(path: Path) -> list[Card]:
    empty = "tools/eval_long_context.py needle ... --output-dir DIR, with DIR in the folder of the run"
    maps = needles_of(path) or [{"folder": "", "cells": [], "trials": 0}]
    return [
        {
            "kind": "heat",
            "title": "Needles found" + (f", {each['folder']}" if len(maps) > 1 else ""),
            "unit": "share of right answers by context (tokens) and depth",
            "cells": [[cell["length"], cell["depth"], cell["accuracy"], cell["probability"]] for cell in each["cells"]],
            "trials": each["trials"],
            "empty": empty,
        }
        for each in maps
    ]


def _contexts(path: Path) -> Card:
    series = [_series(name, losses, dots=True) for name, losses in losses_by_context_of(path).items()]
    needs = "tools/eval_long_context.py perplexity ... --output FILE, with FILE in the folder of the run"
    return {
        **_lines("Loss by length of the context", "nats per token", series, needs),
        "x": "tokens of context",
        "log": True,
    }


def _configuration(configuration: Mapping[str, Any] | None) -> Card:
    """Return the settings by section, with those that were given on the command line marked."""
    sections = {name: content for name, content in (configuration or {}).items() if isinstance(content, dict)}
    given = set((configuration or {}).get("given", ()))
    rows = [
        [section, name, _text(value), name in given]
        for section, content in sections.items()
        for name, value in content.items()
    ]
    return {
        "kind": "settings",
        "title": "Configuration",
        "rows": rows,
        "empty": "--save DIR, in the folder of the run, from the first checkpoint on",
        "wide": True,
    }


def _lines(title: str, unit: str, series: Iterable[Card], empty: str = "the next line of the log") -> Card:
    filled = [each for each in series if each["points"]]
    return {"kind": "lines", "title": title, "unit": unit, "x": "iteration", "series": filled, "empty": empty}


def _bars(title: str, unit: str, rows: list[Card], empty: str) -> Card:
    return {"kind": "bars", "title": title, "unit": unit, "rows": rows, "empty": empty}


def _series(name: str, values: Points, dots: bool = False) -> Card:
    points = [(place, value) for place, value in values.items() if math.isfinite(value)]
    return {"name": name, "points": thinned(points), "dots": dots}


def thinned(points: list[tuple[Any, float]]) -> list[tuple[Any, float]]:
    """Keep the lowest and the highest point of each stretch, so that spikes remain, and the last point."""
    stretch = -(-2 * len(points) // MOST_POINTS)
    if stretch <= 2:
        return points
    kept = set()
    for first in range(0, len(points), stretch):
        part = range(first, min(first + stretch, len(points)))
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept | {len(points) - 1})]


def _scaled(run: RunHistory, name: str) -> dict[int, float]:
    scale = SCALES.get(name, 1.0)
    return {iteration: value * scale for iteration, value in run.train(name).items()}


def _last(values: Points) -> float:
    return values[max(values)]


def _text(value: Any) -> str:
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(count: float) -> str:
    """Format a count of tokens: 1.05 B, 262 M, 8,192."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,.0f}"
