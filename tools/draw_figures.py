#!/usr/bin/env python3
"""Draw the figures of docs/ from the library's own objects.

    tools/draw_figures.py                                   docs/figures/*.svg
    tools/draw_figures.py timeline --format png --folder .  one of them, as a PNG

Each file also stores its figure's content as JSON, so that a test can check whether it is up to date with the code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import headline, layout, memory, tiles, timeline

from megatron.config import ConfigError
from megatron.config.packages import require_package
from megatron.core.atomic_file import atomic_path
from megatron.ranks.interrupts import run_tool

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


class Figure(NamedTuple):
    """A figure: a function for its content, as JSON, and a function that draws it."""

    content: Callable[[], dict[str, Any]]
    draw: Callable[[dict[str, Any]], Any]


FIGURES = {
    "layout": Figure(layout.content, layout.draw),
    "tiles": Figure(tiles.content, tiles.draw),
    "tiles_of_documents": Figure(tiles.content_with_documents, tiles.draw),
    "timeline": Figure(timeline.content, timeline.draw),
    "copies": Figure(memory.copies_content, memory.draw_copies),
    "memory": Figure(memory.content, memory.draw),
    "readme_head": Figure(headline.content, headline.draw),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} [all]")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="output folder [docs/figures]")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="[%(default)s]")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.figures if name not in FIGURES]
    if unknown:
        parser.error(f"there is no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        require_package("matplotlib", "draw_figures.py")
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.figures or FIGURES:
            path = arguments.folder / f"{name}.{arguments.format}"
            save(FIGURES[name], path)
            print(path)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def save(figure: Figure, path: Path) -> None:
    """Draw a figure to a file; an SVG also stores the content, but no date."""
    from matplotlib import pyplot

    content = figure.content()
    drawn = figure.draw(content)
    metadata = {"Date": None, "Description": text_of(content)} if path.suffix == ".svg" else {}
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, dpi=110, metadata=metadata, format=path.suffix[1:])
    pyplot.close(drawn)


def text_of(content: dict[str, Any]) -> str:
    """Return the content of a figure as its file stores it."""
    return json.dumps(content, sort_keys=True)


def text_in(path: Path) -> str | None:
    """Read the content that a figure's file stores."""
    return ElementTree.parse(path).findtext(f".//{DESCRIPTION}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
