"""Compare two sets of weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from megatron.weights.source import MOMENTS, WEIGHTS, StateSource

_ELEMENTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Difference:
    """Distance of two tensors of one name: max |a - b|, and ||a - b|| / ||a||, both computed in fp64."""

    name: str
    largest: float
    relative: float


def names_only_in(first: StateSource, second: StateSource) -> list[str]:
    """Return the names that `first` has and `second` lacks, in order."""
    others = set(second.names)
    return [name for name in first.names if name not in others]


def form_differences(first: StateSource, second: StateSource) -> Iterator[str]:
    """Yield one line for each shape or dtype that differs. Reads no tensor."""
    for name in _common(first, second):
        ours, theirs = ((source.shape(name), source.dtype(name)) for source in (first, second))
        if ours != theirs:
            yield f"{name}: {_form(*ours)} and {_form(*theirs)}"


def value_differences(first: StateSource, second: StateSource) -> Iterator[Difference]:
    """Compare the values of tensors of one shape, and the moments where both have them. Holds two tensors in memory."""
    for name in _common(first, second):
        if first.shape(name) != second.shape(name):
            continue
        both = [part for part in first.parts(name) if part in second.parts(name)]
        for part in (part for part in (WEIGHTS, *MOMENTS) if part in both):
            tensors = [_flat(source, name, part) for source in (first, second)]
            largest, relative = _distance(*tensors)
            if largest != 0:
                yield Difference(name if part == WEIGHTS else f"{name} {part}", largest, relative)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a configuration to its fields by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _common(first: StateSource, second: StateSource) -> list[str]:
    others = set(second.names)
    return [name for name in first.names if name in others]


def _flat(source: StateSource, name: str, part: str) -> Tensor:
    return source.read(name, part, 0, Size(source.shape(name)).numel())


def _distance(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return (max |a - b|, ||a - b|| / ||a||); equal infinities, and elements that are nan in both, count as equal."""
    largest = squares = scale = torch.zeros((), dtype=torch.float64)
    for a, b in zip(first.split(_ELEMENTS_AT_ONCE), second.split(_ELEMENTS_AT_ONCE), strict=True):
        a, b = a.double(), b.double()
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)
        largest = torch.maximum(largest, apart.abs().max())  # stays nan once it is
        squares, scale = squares + apart.square().sum(), scale + a.square().sum()
    return float(largest), float((squares / scale).sqrt()) if float(squares) else 0.0


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
