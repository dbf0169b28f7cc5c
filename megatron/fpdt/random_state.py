"""Replay of random numbers: what a dropout mask was in the forward pass, it is again when that work is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomStates:
    """State of the device's default generator at each chunk, recorded in forward order and replayed in any order.

    Both states live on the host: recording and replaying never wait for the device.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._device = device
        self._enabled = enabled
        self._states: list[Tensor] = []

    def record(self) -> None:
        """Remember the state for the next chunk."""
        if self._enabled:
            self._states.append(self._get())

    @contextmanager
    def replay(self, chunk: int) -> Iterator[None]:
        """Run with the state recorded for `chunk`, and leave the generator as it was found."""
        if not self._enabled:
            yield
            return
        current = self._get()
        self._set(self._states[chunk])
        try:
            yield
        finally:
            self._set(current)

    def _get(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
