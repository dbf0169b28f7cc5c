"""Number types for argparse: a value that is no number, or out of range, is an error with the flag's name."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron.config.rules.ranges import Range

_LARGEST = 2**63 - 1


def real(low: float, example: str, open_low: bool = False) -> Callable[[str], float]:
    """Return a type for argparse: a finite number, at least `low`, or above it with `open_low`."""
    allowed = Range(low, _LARGEST, low_open=open_low)

    def parse(text: str) -> float:
        return float(_checked(text, float, allowed, f"a number {Range(low, low_open=open_low)}", example))

    return parse


def whole(low: int, example: str) -> Callable[[str], int]:
    """Return a type for argparse: a whole number, at least `low`, that fits into 63 bits."""

    def parse(text: str) -> int:
        return int(_checked(text, int, Range(low, _LARGEST), f"a whole number, at least {low}", example))

    return parse


def _checked(text: str, convert: Callable[[str], float], allowed: Range, described: str, example: str) -> float:
    try:
        value = convert(text)
        if allowed.holds(value):
            return value
    except (ValueError, OverflowError):
        pass
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise argparse.ArgumentTypeError(f"{shown!r} must be {described} and at most {_LARGEST:.0e}; use {example}")
