#!/usr/bin/env python3
"""Show a log with iterations in the compact form, as --log-format compact writes them; other lines are left alone.

pretrain_gpt.py ... 2>&1 | tee train.log | python tools/compact_log.py     a run, with all columns in its log
tail -f train.log | python tools/compact_log.py                            a run that another machine writes
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.logging.compact_line import format_compact
from megatron.logging.log_line import IterationRecord, parse_line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    for line in sys.stdin:
        print(shown(line), end="", flush=True)
    return 0


def shown(line: str) -> str:
    """Return a line of a log as it is shown."""
    record = parse_line(line)
    return f"{format_compact(record)}\n" if isinstance(record, IterationRecord) else line


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, whose last lines are still to be shown
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(main())
