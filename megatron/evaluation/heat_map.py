"""Heat map of needle retrieval: length across, depth down, green where needles are found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.evaluation.needle import Cell


def draw_heat_map(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Write a PNG with a square per cell, its color and its number the accuracy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lengths, depths = (sorted({getattr(cell, name) for cell in cells}) for name in ("length", "depth"))
    accuracy = {(cell.length, cell.depth): cell.accuracy for cell in cells}
    grid = [[accuracy[length, depth] for length in lengths] for depth in depths]
    figure, axes = pyplot.subplots(figsize=(2 + 0.8 * len(lengths), 2 + 0.4 * len(depths)), layout="constrained")
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set(title=title, xlabel="context (tokens)", ylabel="depth of the needle")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="answers that are right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
