"""Numbers of tokens as people write them: 131072, 131,072, 131_072, 128K, 1.5M; K is 1024 and M is 1024 K."""

from __future__ import annotations

import re
from decimal import Decimal

K = 1024
M = 1024 * K
LARGEST = 2**63 - 1
_UNITS = {"": 1, "K": K, "M": M}
# A decimal point needs a unit or an exponent: 128.000 means 128 to some and 128,000 to others.
_FORM = re.compile(
    r"(?P<number>[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:_[0-9]{3})+|[0-9]+)(?:\.[0-9]+(?=[KMkmeE]))?)"
    r"(?:(?P<unit>[KMkm])|(?P<exponent>[eE]\+?[0-9]{1,3}))?"
)
_SHOWN = 40  # characters of a text that an error repeats


def parse_token_count(text: str) -> int:
    """Return the number of tokens that a text writes: digits, in groups of three or not, then K, M or an exponent.

    Raises:
        ValueError: the text has another form, or is not a whole number of 64 bits.
    """
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{shown} is not a number of tokens; give one, such as 131072, 128K or 1M")
    number = Decimal(re.sub("[,_]", "", match["number"]) + (match["exponent"] or ""))
    count = number * _UNITS[(match["unit"] or "").upper()]
    if abs(count) > LARGEST:
        raise ValueError(f"{shown} is too large; give at most {LARGEST} tokens")
    if count % 1:
        raise ValueError(f"{shown} is not a whole number of tokens (K is 1024, M is 1024 K); it is {count.normalize()}")
    return int(count)


def format_token_count(count: int) -> str:
    """Return the shortest exact form: 1M, 1536K, or the digits where K does not divide the number."""
    for unit, size in (("M", M), ("K", K)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
