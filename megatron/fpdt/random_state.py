"""Replay of random numbers: recomputation draws the same dropout masks as the forward pass did."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def generator_state(device: torch.device) -> Tensor:
    """Return the state of the device's default generator, on the host, without waiting for the device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class RandomStates:
    """States of the device's default generator by key, recorded in the forward pass and replayed in any order.

    They are stored on the host, so recording and replaying never wait for the device.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._device = device
        self._enabled = enabled
        self._states: dict[Hashable, Tensor] = {}

    def record(self, key: Hashable) -> None:
        """Record the state with which the work of `key` begins."""
        if self._enabled:
            self._states[key] = self._get()

    @contextmanager
    def replay(self, key: Hashable) -> Iterator[None]:
        """Run with the state recorded for `key`, then restore the generator."""
        with self.preserved():
            self.continue_with(key)
            yield

    def continue_with(self, key: Hashable) -> None:
        """Within `replay` or `preserved`, switch to the state recorded for `key`."""
        if self._enabled:
            self._set(self._states[key])

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the generator on exit."""
        if not self._enabled:
            yield
            return
        current = self._get()
        try:
            yield
        finally:
            self._set(current)

    def _get(self) -> Tensor:
        return generator_state(self._device)

    def _set(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
