"""Shared style of the figures: white background, large letters, and colors that color-blind readers can tell apart.

The colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), some lighter as a background for text.
"""

from __future__ import annotations

from typing import Any

BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
PALE_SKY, PALE_ORANGE, PALE_GREEN, PALE_PURPLE, PALE_GREY = "#BFE3F7", "#FBE0A8", "#A9DFCD", "#EFCFE0", "#EEEEEE"
GREY, INK = "#767676", "#1A1A1A"
RANK_COLORS = (PALE_SKY, PALE_ORANGE, PALE_GREEN, PALE_PURPLE)

SETTINGS: dict[str, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelcolor": INK,
    "text.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "figures",  # the same ids in the file each time it is drawn
    "svg.fonttype": "none",  # text as text, which is short and readable in a diff
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Create (figure, axes), sized in inches, to be saved without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(SETTINGS)
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def bare(axes: Any, width: float, height: float, title: str) -> None:
    """Make a panel a plane of `width` by `height` units, origin at the upper left, without axes."""
    axes.set(xlim=(-0.05, width + 0.05), ylim=(height + 0.05, -0.05), aspect="equal")
    axes.set_title(title, loc="left")
    axes.axis("off")


def box(
    axes: Any, corner: tuple[float, float], size: tuple[float, float], color: str, text: str = "", **options: Any
) -> None:
    """Draw a rectangle with centered text; `options` are the text's."""
    from matplotlib.patches import Rectangle

    (x, y), (width, height) = corner, size
    axes.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor="white", linewidth=1))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **options)


def legend_of(target: Any, colors: dict[str, str], **options: Any) -> None:
    """Draw a legend of colors."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor=GREY, linewidth=0.5, label=label) for label, color in colors.items()]
    target.legend(handles=handles, frameon=False, **options)
