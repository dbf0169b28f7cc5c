"""The time in which the device had no work because the host waited."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class Stalls:
    """Times waits of the host by the device's clock.

    The host queues work ahead of the device, so most of its waiting costs nothing. An event on the compute stream
    before a wait and one after it are apart by the time for which the device had run out of work. Without CUDA the host
    is the device, and all its waiting counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # that the device may not have reached

    @property
    def seconds(self) -> float:
        """The sum over the waits that the device has passed so far."""
        self._add_passed()
        return self._seconds

    def during(self, wait: Callable[[], T]) -> T:
        """Wait, and return the result."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            try:
                return wait()
            finally:
                self._seconds += time.perf_counter() - started
        self._add_passed()  # so that few events are held
        start = self._mark()
        try:
            return wait()
        finally:
            self._waits.append((start, self._mark()))

    def _add_passed(self) -> None:
        while self._waits and self._waits[0][1].query():
            start, end = self._waits.popleft()
            self._seconds += start.elapsed_time(end) / 1e3

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
