"""Protocols for sources of parameters and Adam's moments, whatever the file format.

PARTS are the parts of a parameter's training state: the fp32 master weights, and Adam's two moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron.weights.safetensors_folder import SafetensorsFolder

WEIGHTS = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (WEIGHTS, *MOMENTS)


class WeightSource(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def names(self) -> Sequence[str]:
        """Every parameter once; a tied one under the name of the module that owns it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of `get`'s result, without reading the parameter."""

    def get(self, name: str) -> Tensor:
        """Read the whole parameter, on the CPU."""


class StateSource(WeightSource, Protocol):
    """Weights and, if `step` is a number, Adam's moments; any run of elements can be read by itself."""

    @property
    def step(self) -> int | None:
        """Steps that Adam has taken; None for weights alone."""

    @property
    def loss_scale(self) -> Mapping[str, float]:
        """State of the dynamic fp16 loss scale by DeepSpeed's names; empty where there is none."""

    def parts(self, name: str) -> Sequence[str]:
        """Return which of PARTS a parameter has: only the weights if it is frozen."""

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        """Read elements [start, start + count) of a flattened parameter's weights or moment; [count], on the CPU."""


class WeightsAlone:
    """A folder of safetensors as a StateSource without moments."""

    step: int | None = None

    def __init__(self, folder: SafetensorsFolder) -> None:
        self._folder = folder
        self.loss_scale: Mapping[str, float] = {}

    @property
    def names(self) -> Sequence[str]:
        return self._folder.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._folder.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._folder.dtype(name)

    def get(self, name: str) -> Tensor:
        return self._folder.get(name)

    def parts(self, name: str) -> Sequence[str]:
        return (WEIGHTS,)

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        assert part == WEIGHTS, "a source without a step has no moments"
        return self._folder.read(name, start, count)
