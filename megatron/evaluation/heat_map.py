"""Heat maps by context length: needles by depth, and scores by task; green where answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.evaluation.needle import Cell
from megatron.evaluation.ruler.run import TaskResult


@dataclass(frozen=True)
class _Grid:
    """Values by row and column, from 0 (red) to `best` (green)."""

    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    best: float
    number: str
    """Format of a value."""


def draw_heat_map(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Write a PNG with a square per cell, its color and its number the accuracy."""
    lengths, depths = (sorted({getattr(cell, name) for cell in cells}) for name in ("length", "depth"))
    accuracy = {(cell.length, cell.depth): cell.accuracy for cell in cells}
    values = [[accuracy[length, depth] for length in lengths] for depth in depths]
    grid = _Grid(values, [f"{depth:.0%}" for depth in depths], [f"{length:,}" for length in lengths], 1, ".2f")
    _draw(grid, path, title, ("depth of the needle", "answers that are right"))


def draw_scores(results: Sequence[TaskResult], path: Path, title: str) -> None:
    """Write a PNG with a square per task and length, its color and its number the score."""
    lengths, tasks = sorted({result.length for result in results}), list(dict.fromkeys(each.task for each in results))
    scores = {(result.task, result.length): result.score for result in results}
    values = [[scores[task, length] for length in lengths] for task in tasks]
    _draw(_Grid(values, tasks, [f"{length:,}" for length in lengths], 100, ".0f"), path, title, ("task", "score"))


def _draw(grid: _Grid, path: Path, title: str, names: tuple[str, str]) -> None:
    """Write the PNG; `names` are those of the rows and of the values."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    size = (2 + 0.8 * len(grid.columns), 2 + 0.4 * len(grid.rows))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid.values, cmap="RdYlGn", vmin=0, vmax=grid.best, aspect="auto")
    axes.set(title=title, xlabel="context (tokens)", ylabel=names[0])
    axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=45)
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    for row, values in enumerate(grid.values):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:{grid.number}}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label=names[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
