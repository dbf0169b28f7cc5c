#!/usr/bin/env python3
"""Write the report of a run as one HTML file, which opens without a server or network.

    tools/report_run.py runs/llama                  runs/llama/report.html
    tools/report_run.py runs/llama --watch 60       the same, written again every minute while the run is in progress

It shows what the folder holds: curves, loss by position, memory, the plan, profiles, results of evaluations, and the
configuration. A section without content says which flag fills it.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from argument_types import whole
from report.cards import cards_of, tiles_of

from megatron.core.atomic_file import atomic_path
from megatron.logging.run_history import read_run
from megatron.ranks.interrupts import run_tool

PARTS = Path(__file__).resolve().parent / "report"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<div class="soft">{about}</div>
<div class="tiles"></div>
</header>
<noscript>The curves are drawn by the script in this file; allow it to run.</noscript>
<main></main>
<script type="application/json" id="report">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder with TensorBoard's events or a .log file, or the log"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML to write [report.html in the folder]")
    parser.add_argument(
        "--watch", type=whole(1, "60"), metavar="SECONDS", help="write it again so often, until interrupted [no]"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    run: Path = arguments.run
    output: Path = arguments.output or (run if run.is_dir() else run.parent) / "report.html"
    try:
        write(run, output, arguments.watch)
        sys.stdout.write(f"{output}\n")
        sys.stdout.flush()
        while arguments.watch:
            time.sleep(arguments.watch)
            write(run, output, arguments.watch)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def write(run: Path, output: Path, refresh: int | None) -> None:
    """Read a run and write its page, which loads itself again every `refresh` seconds."""
    page = page_of(run, refresh)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def page_of(run: Path, refresh: int | None) -> str:
    """Return the HTML of a run; ValueError or OSError if there is nothing to read."""
    history = read_run(run)
    report = {"tiles": tiles_of(history, run), "cards": cards_of(run, history), "refresh": refresh}
    data = json.dumps(report, separators=(",", ":")).replace("</", "<\\/")
    about = f"written {datetime.now():%Y-%m-%d %H:%M:%S}" + (f", again every {refresh} s" if refresh else "")
    style, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return PAGE.format(title=html.escape(history.name), about=about, style=style, data=data, script=script)


if __name__ == "__main__":
    sys.exit(run_tool(main))
