"""Checked values of a config.json: each must have the right type and be in range."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from megatron.config.rules.ranges import RANGES
from megatron.weights.errors import WeightsError

HuggingFaceConfig = Mapping[str, Any]
# Larger than any size of a model, and small enough that the product of two can be the size of a tensor.
_MOST = 2**31 - 1
_REMEDY = "use the model's own config.json"


def required(config: HuggingFaceConfig, key: str) -> Any:
    """Return the value of a key; WeightsError if it is absent or null."""
    value = config.get(key)
    if value is None:
        raise WeightsError(f"config.json has no {key}, which its model_type needs; {_REMEDY}.")
    return value


def count(config: HuggingFaceConfig, key: str, default: int | None = None) -> int:
    """Return a whole number above 0; the default if it is absent or null. WeightsError without a default."""
    value = required(config, key) if default is None else config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value <= _MOST:
        raise WeightsError(
            f"config.json has {key} {_short(value)}, which must be a whole number above 0 and at most {_MOST}; "
            f"{_REMEDY}."
        )
    return value


def number(config: HuggingFaceConfig, key: str, default: float, name: str) -> float:
    """Return a finite number in the range of our setting `name`; the default if it is absent, but not if it is null."""
    value = config.get(key, default)
    allowed = RANGES[name]
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for nan
    if not is_number or not allowed.holds(value):
        raise WeightsError(f"config.json has {key} {_short(value)}, which must be a number {allowed}; {_REMEDY}.")
    return float(value)


def switch(config: HuggingFaceConfig, key: str, default: bool) -> bool:
    """Return true or false; the default if the key is absent, but not if it is null."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise WeightsError(f"config.json has {key} {_short(value)}, which must be true or false; {_REMEDY}.")
    return value


def _short(value: object) -> str:
    """Return the value's repr, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
