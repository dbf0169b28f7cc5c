"""Losses that a person should look at: not finite, or far above those before."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 100  # iterations that the running mean is of
ENOUGH = 10  # of them before anything counts as a spike


class LossWatch:
    """Looks at the loss of every iteration, in order."""

    def __init__(self, spike_factor: float | None) -> None:
        """Without `spike_factor` only losses that are not finite are told."""
        self._spike_factor = spike_factor
        self._before: deque[float] = deque(maxlen=WINDOW)

    def look(self, iteration: int, loss: float) -> str | None:
        """Return what is to be said of this loss, if anything."""
        if not math.isfinite(loss):
            return f"the loss of iteration {iteration} is {loss}"
        mean = statistics.fmean(self._before) if len(self._before) >= ENOUGH else math.inf
        count = len(self._before)
        self._before.append(loss)
        if self._spike_factor is None or loss <= self._spike_factor * mean:
            return None
        return (
            f"the loss of iteration {iteration} is {loss:.4f}, {loss / mean:.2f} times the mean of the {count} before "
            f"({mean:.4f})"
        )
