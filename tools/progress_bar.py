"""Progress bars of the tools, on a terminal and where tqdm is installed."""

from __future__ import annotations

import sys
from typing import Any


class NoBar:
    """Accepts what a bar accepts, and shows nothing."""

    def update(self, count: int = 1) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress_bar(unit: str, total: int | None = None) -> Any:
    """Return tqdm's bar, or a `NoBar`; one line says so if only the package is missing."""
    if not sys.stderr.isatty():
        return NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        sys.stderr.write("no progress bar: the package tqdm is not installed; run `pip install tqdm`\n")
        return NoBar()
    return tqdm(total=total, unit=unit)
