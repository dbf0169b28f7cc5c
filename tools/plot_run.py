"""Plot the logged metrics of runs: `python tools/plot_run.py RUN_DIR [OTHER_RUN_DIR ...] --output run.png`.

Loss, gradient norm and loss by position; speed, utilization and memory over training time. A run may still be in
progress. Several runs share the same panels, each in its own color.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

import numpy as np

from megatron.config.packages import require_package
from megatron.logging.run_history import RunHistory, read_run
from megatron.ranks.interrupts import run_tool

COLUMNS = 2
STYLES = ("-", "--", ":")  # of the lines of one run in one panel
EVALUATIONS = {"validation": ("o", "--"), "test": ("s", "none")}
MARKS = {"skipped_iterations": ("x", "skipped"), "nan_iterations": ("*", "not finite")}


class Panel(NamedTuple):
    """Series of a run, from a name of `SCALARS` to its suffix in the legend, over tokens or over hours."""

    label: str
    series: dict[str, str]
    over_hours: bool = True


PANELS = (
    Panel("gradient norm", {"grad_norm": ""}, over_hours=False),
    Panel("tokens/s/GPU", {"tokens_per_second_per_gpu": ""}),
    Panel("share of the device's peak", {"mfu": "MFU", "hfu": "HFU"}),
    Panel("peak GPU memory (GiB)", {"peak_gpu_gib": ""}),
    Panel("host memory (GiB)", {"host_pool_gib": "host pool", "host_gib": "process"}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the runs, write the picture, return the exit code."""
    arguments = parse_arguments(argv)
    try:
        require_package("matplotlib", "plot_run.py")
        runs = _named_apart([read_run(path) for path in arguments.runs], arguments.runs)
        draw(runs, arguments.output)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"plot_run: {error}\n")
        return 2
    sys.stdout.write(f"{arguments.output}\n")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plot the logged metrics of runs.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder with TensorBoard's events or a .log file, or the log"
    )
    parser.add_argument("--output", type=Path, default=Path("run.png"), help="picture to write [run.png]")
    return parser.parse_args(argv)


def _named_apart(runs: list[RunHistory], paths: Sequence[Path]) -> list[RunHistory]:
    """Name runs by their paths where their names are the same."""
    if len({run.name for run in runs}) < len(runs):
        for run, path in zip(runs, paths, strict=True):
            run.name = str(path)
    return runs


def draw(runs: Sequence[RunHistory], output: Path) -> None:
    """Draw a panel for each metric that any of the runs has."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    painters: list[Callable[[Any], None]] = [lambda axes: _draw_losses(axes, runs)]
    if any(run.positions() for run in runs):
        painters.append(lambda axes: _draw_positions(axes, runs))
    for panel in PANELS:
        if any(run.train(name) for run in runs for name in panel.series):
            painters.append(lambda axes, panel=panel: _draw_panel(axes, panel, runs))
    rows = -(-len(painters) // COLUMNS)
    size = (7 * COLUMNS, 3.6 * rows)
    figure, grid = pyplot.subplots(rows, COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for axes, paint in zip(grid.flat, painters, strict=False):
        paint(axes)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    for axes in list(grid.flat)[len(painters) :]:
        axes.set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _tokens_at(run: RunHistory, iterations: Iterable[int]) -> list[float]:
    """Return tokens consumed at iterations, interpolated linearly between the known ones."""
    known = {0: 0.0, **run.train("consumed_tokens")}
    return np.interp(list(iterations), list(known), list(known.values())).tolist()


def _draw_losses(axes: Any, runs: Sequence[RunHistory]) -> None:
    for number, run in enumerate(runs):
        color, losses = f"C{number}", run.train("loss")
        axes.plot(_tokens_at(run, losses), list(losses.values()), color=color, linewidth=1.2, label=run.name)
        for part, (marker, line) in EVALUATIONS.items():
            values = run.series.get(f"{part}/loss", {})
            if values:
                label = f"{run.name}, {part}"
                axes.plot(
                    _tokens_at(run, values), list(values.values()), marker=marker, linestyle=line, color=color,
                    markersize=4, label=label,
                )  # fmt: skip
        for counter, (marker, meaning) in MARKS.items():
            _draw_marks(axes, run, run.marks(counter), marker, color, f"{run.name}, {meaning}")
    axes.set(xlabel="tokens", ylabel="loss per token (nats)")


def _draw_marks(axes: Any, run: RunHistory, iterations: list[int], marker: str, color: str, label: str) -> None:
    """Mark iterations at the foot of the panel, where they are visible even without a loss."""
    if iterations:
        places = _tokens_at(run, iterations)
        foot = axes.get_xaxis_transform()  # y from 0 at the foot to 1
        axes.plot(places, [0.03] * len(places), marker, transform=foot, color=color, label=label)


def _draw_positions(axes: Any, runs: Sequence[RunHistory]) -> None:
    """Draw the loss of each bucket as a step from its first position to its last."""
    for number, run in enumerate(runs):
        buckets = run.positions()
        if buckets:
            edges = [buckets[0].first, *(bucket.end for bucket in buckets)]
            axes.stairs([bucket.loss for bucket in buckets], edges, baseline=None, color=f"C{number}", label=run.name)
            widths = [end - first for first, end in pairwise(edges)]
            if widths[-1] > 2 * widths[0]:
                axes.set_xscale("symlog", base=2, linthresh=edges[1])
    axes.set(xlabel="position in the context (tokens)", ylabel="validation loss (nats)")


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[RunHistory]) -> None:
    for number, run in enumerate(runs):
        hours = run.hours()
        for (name, suffix), style in zip(panel.series.items(), STYLES, strict=False):
            values = run.train(name)
            if values:
                places = [hours[i] for i in values] if panel.over_hours else _tokens_at(run, values)
                label = f"{run.name}, {suffix}" if suffix else run.name
                axes.plot(places, list(values.values()), style, color=f"C{number}", linewidth=1.2, label=label)
    axes.set(xlabel="hours of training" if panel.over_hours else "tokens", ylabel=panel.label)


if __name__ == "__main__":
    sys.exit(run_tool(main))
