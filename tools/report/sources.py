"""What the folder of a run holds, besides its history: configuration, profiles and results of evaluations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.json_text import parse_object
from megatron.monitoring.kernel_times import COPIES, Kernel
from megatron.monitoring.profiling import KINDS_OF_RANGES

LARGEST_TRACE = 64 * 2**20  # bytes, compressed; a larger one takes minutes to read
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
DIRECTIONS = {"Memcpy HtoD": "copies in", "Memcpy DtoH": "copies out"}
COLUMNS = 1500  # of a timeline: gaps that are narrower are not shown

Span = tuple[float, float]  # seconds since the start of the trace: start and end


def configuration_of(run: Path) -> dict[str, Any] | None:
    """Read the configuration that the newest checkpoint below a run's folder stores; None without a checkpoint."""
    return _object(_newest(run, "global_step*/config.json"))


def profile_of(run: Path) -> dict[str, Any] | None:
    """Read the newest summary of a profile (--profile); None without one."""
    return _object(_newest(run, "*.summary.json"))


def needles_of(run: Path) -> list[dict[str, Any]]:
    """Read the needle maps of `tools/eval_long_context.py needle`, each with the `folder` that it is in."""
    return [
        {"folder": path.parent.name, **content}
        for path in _files(run, "needle.json", "*/needle.json")
        if (content := _object(path))
    ]


def losses_by_context_of(run: Path) -> dict[str, dict[int, float]]:
    """Read the losses by context of `tools/eval_long_context.py perplexity --output`, by the name of the file."""
    contents = {path.stem: _object(path) or {} for path in _files(run, "*.json", "*/*.json")}
    return {
        name: {row["context"]: row["loss"] for row in content["contexts"]}
        for name, content in contents.items()
        if isinstance(content.get("contexts"), list)
    }


def timeline_of(run: Path) -> dict[str, list[Span]] | None:
    """Return what ran when, by lane, from the newest trace; None without one, or if it is too large to read.

    The lanes are the kinds of kernels and the directions of copies; without a GPU, the kinds of the host's ranges.
    """
    path = _newest(run, "*.trace.json.gz")
    if path is None or path.stat().st_size > LARGEST_TRACE:
        return None
    with gzip.open(path, "rt", encoding="utf-8") as text:
        events = [event for event in json.load(text)["traceEvents"] if event.get("ph") == "X"]
    spans = [(_lane(event), event["ts"] * 1e-6, event["dur"] * 1e-6) for event in events if event["cat"] in ON_GPU]
    if not spans:
        named = (event for event in events if event["cat"] == "user_annotation" and event["name"] in KINDS_OF_RANGES)
        spans = [(event["name"], event["ts"] * 1e-6, event["dur"] * 1e-6) for event in named]
    if not spans:
        return None
    first = min(start for _, start, _ in spans)
    shortest_gap = (max(start + seconds for _, start, seconds in spans) - first) / COLUMNS
    lanes: dict[str, list[Span]] = {}
    for lane, start, seconds in sorted(spans, key=lambda span: span[1]):
        _append(lanes.setdefault(lane, []), (start - first, start - first + seconds), shortest_gap)
    return lanes


def _lane(event: dict[str, Any]) -> str:
    kind = Kernel(event["name"], 0, 0).kind
    return DIRECTIONS.get(event["name"][:11], kind) if kind == COPIES else kind


def _append(spans: list[Span], span: Span, shortest_gap: float) -> None:
    """Append a span, or extend the last one where the gap between them is too narrow to be seen."""
    if spans and span[0] - spans[-1][1] < shortest_gap:
        spans[-1] = spans[-1][0], max(spans[-1][1], span[1])
    else:
        spans.append(span)


def _files(run: Path, *patterns: str) -> Iterator[Path]:
    """Yield the files of a run's folder that match one of the patterns."""
    if run.is_dir():
        yield from (path for pattern in patterns for path in sorted(run.glob(pattern)))


def _newest(run: Path, pattern: str) -> Path | None:
    files = run.rglob(pattern) if run.is_dir() else ()
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def _object(path: Path | None) -> dict[str, Any] | None:
    """Read a JSON object; None where there is none, or while it is being written."""
    try:
        return None if path is None else parse_object(path.read_bytes())
    except (OSError, ValueError):
        return None
