"""Losses of the last iterations, for the mean of a log line and for spikes: not finite, or far above the running mean.

The log and the rollback share one window, so that both forget the iterations that a rollback repeats.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from itertools import islice

import torch
from torch import Tensor

SPIKE_WINDOW = 100  # finite losses in the running mean
ENOUGH = 10  # finite losses needed before a loss can count as a spike


class LossWindow:
    """The losses of the last iterations, in order. They stay on the device until the window is asked about them."""

    def __init__(self, spike_factor: float | None, num_iterations: int = SPIKE_WINDOW) -> None:
        """Warn of losses above `spike_factor` times the running mean, and of those not finite; None: of these alone.

        The window holds at least `num_iterations` losses.
        """
        self._spike_factor = spike_factor
        self._on_device: dict[int, Tensor] = {}
        self._losses: deque[tuple[int, float]] = deque(maxlen=max(num_iterations, SPIKE_WINDOW))
        self._warnings: dict[int, str] = {}

    def add(self, iteration: int, loss: Tensor) -> None:
        """Add the mean token loss of an iteration, a scalar on the device."""
        self._on_device[iteration] = loss

    def after(self, iteration: int) -> list[float]:
        """Return the losses of the iterations after this one. Waits for the device."""
        self._read()
        return [loss for each, loss in self._losses if each > iteration]

    def warning(self, iteration: int) -> str | None:
        """Return the warning about the loss of this iteration, if any. Waits for the device."""
        self._read()
        return self._warnings.get(iteration)

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call. Waits for the device."""
        self._read()
        warnings = list(self._warnings.values())
        self._warnings.clear()
        return warnings

    def forget_after(self, iteration: int) -> None:
        """Forget the iterations after this one, which a rollback repeats. Waits for the device."""
        self._read()
        while self._losses and self._losses[-1][0] > iteration:
            self._losses.pop()
        self._warnings = {each: warning for each, warning in self._warnings.items() if each <= iteration}

    def _read(self) -> None:
        if not self._on_device:
            return
        for iteration, loss in zip(self._on_device, torch.stack([*self._on_device.values()]).tolist(), strict=True):
            warning = self._judge(iteration, loss)
            if warning is not None:
                self._warnings[iteration] = warning
            self._losses.append((iteration, loss))
        self._on_device.clear()

    def _judge(self, iteration: int, loss: float) -> str | None:
        """Return the warning about a loss that follows those read so far, or None."""
        if not math.isfinite(loss):
            return f"the loss of iteration {iteration} is {loss}"
        finite = (before for _, before in reversed(self._losses) if math.isfinite(before))
        before = list(islice(finite, SPIKE_WINDOW))
        mean = statistics.fmean(before) if len(before) >= ENOUGH else math.inf
        if self._spike_factor is None or loss <= self._spike_factor * mean:
            return None
        return (
            f"the loss of iteration {iteration} is {loss:.4f}, {loss / mean:.2f} times the mean of the {len(before)} "
            f"before ({mean:.4f})"
        )
