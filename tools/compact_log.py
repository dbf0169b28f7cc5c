#!/usr/bin/env python3
"""Show a log with iterations in the compact form, as --log-format compact writes them; other lines are left alone.

    python tools/compact_log.py    reads standard input: a run, or `tail -f train.log`

The launch scripts show a run so on a terminal, and write all columns to its log.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, whose last lines are still to be shown

from megatron.logging.compact_line import format_compact
from megatron.logging.log_line import IterationRecord, parse_line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    parse_arguments(argv)
    for line in sys.stdin:
        print(shown(line), end="", flush=True)
    return 0


def shown(line: str) -> str:
    """Return a line of a log as it is shown."""
    record = parse_line(line)
    return f"{format_compact(record)}\n" if isinstance(record, IterationRecord) else line


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(main())
