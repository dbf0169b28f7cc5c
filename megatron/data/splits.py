"""Parsing of `--split` and `--data-path`."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron.data.errors import DataError

PART_NAMES = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Parse the shares of training, validation and test, summing to 1, from text such as "969,30,1" or "90/10".

    Missing parts get 0. Raises DataError.
    """
    allowed = f"--split ({split!r}) must be one to three shares, none negative, not all 0; use for example 969,30,1."
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        raise DataError(allowed) from None
    total = sum(shares)
    if len(shares) > len(PART_NAMES) or min(shares) < 0 or not math.isfinite(total) or total == 0:
        raise DataError(allowed)
    train, valid, test = (share / total for share in [*shares, 0.0, 0.0][:3])
    return train, valid, test


def split_documents(num_documents: int, shares: Sequence[float]) -> list[range]:
    """Cut range(num_documents) into consecutive ranges, one per share; each boundary is rounded to whole documents."""
    bounds = [0, *(round(share * num_documents) for share in accumulate(shares))]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def parse_data_paths(data_paths: Sequence[str]) -> tuple[list[str], list[float]]:
    """Parse one prefix, or pairs of weight and prefix, to prefixes and weights that sum to 1. Raises DataError."""
    given = " ".join(data_paths)
    allowed = f"--data-path ({given}) must be one prefix, or pairs of weight and prefix; use for example 0.3 A 0.7 B."
    if len(data_paths) == 1:
        return [data_paths[0]], [1.0]
    if not data_paths or len(data_paths) % 2:
        raise DataError(allowed)
    try:
        weights = [float(weight) for weight in data_paths[::2]]
    except ValueError:
        raise DataError(allowed) from None
    total = sum(weights)
    if min(weights) <= 0 or not math.isfinite(total):
        raise DataError(f"--data-path ({given}) has a weight that is not above 0; leave that dataset out.")
    return list(data_paths[1::2]), [weight / total for weight in weights]
