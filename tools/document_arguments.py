#!/usr/bin/env python3
"""Write docs/arguments.md: every flag of pretrain_gpt.py, generated from the code.

python tools/document_arguments.py            write it
python tools/document_arguments.py --check    exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # the imports below take seconds
    from megatron.ranks.interrupts import end_on_interrupt

    end_on_interrupt()

from megatron.arguments import build_parser
from megatron.config.upstream_flags import OTHER_NAMES, REFUSED
from megatron.ranks.interrupts import run_tool

PAGE = Path(__file__).resolve().parents[1] / "docs" / "arguments.md"
HEAD = """# Arguments

Every flag of `pretrain_gpt.py`, written from the code by `python tools/document_arguments.py`; `--help` prints the
same. Underscores and dashes are the same. A switch has no value. What a flag leaves open is said with it.
"""
OTHER = """
## Flags of Megatron that have another name here

Giving one is an error that names the flag to use.

| Megatron's | here |
|---|---|
"""
REFUSALS = """
## Flags of Megatron that are refused

They would change the result, and cannot be honored.

| flag | why | in its place |
|---|---|---|
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    text = page()
    try:
        if not arguments.check:
            PAGE.write_text(text)
        elif not PAGE.is_file() or PAGE.read_text() != text:
            print(f"{PAGE} is not what the code says; run python tools/document_arguments.py", file=sys.stderr)
            return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def page() -> str:
    """Return the text of the page."""
    names = "".join(f"| `--{theirs}` | `--{ours}` |\n" for theirs, ours in sorted(OTHER_NAMES.items()))
    refusals = "".join(f"| `--{flag.name}` | {flag.why} | {cell(flag.advice)} |\n" for flag in REFUSED)
    return HEAD + "".join(sections()) + OTHER + names + REFUSALS + refusals


def sections() -> Iterator[str]:
    """Yield a heading and a table for each group of flags."""
    for group in build_parser()._action_groups:
        flags = [action for action in group._group_actions if action.dest != "help"]
        if flags:
            yield f"\n## {group.title}\n\n| flag | value | |\n|---|---|---|\n"
            yield from map(row, flags)


def row(action: argparse.Action) -> str:
    value = f"`{cell(str(action.metavar))}`" if action.nargs != 0 and action.metavar else ""
    return f"| `{action.option_strings[0]}` | {value} | {cell((action.help or '').replace('%%', '%'))} |\n"


def cell(text: str) -> str:
    """Escape text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(run_tool(main))
