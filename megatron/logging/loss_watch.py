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
        self._before: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # iterations and their losses

    def look(self, iteration: int, loss: float) -> str | None:
        """Return what is to be said of this loss, if anything."""
        if not math.isfinite(loss):
            return f"the loss of iteration {iteration} is {loss}"
        count = len(self._before)
        mean = statistics.fmean(before for _, before in self._before) if count >= ENOUGH else math.inf
        self._before.append((iteration, loss))
        if self._spike_factor is None or loss <= self._spike_factor * mean:
            return None
        return (
            f"the loss of iteration {iteration} is {loss:.4f}, {loss / mean:.2f} times the mean of the {count} before "
            f"({mean:.4f})"
        )

    def forget_after(self, iteration: int) -> None:
        """Take back the losses of the iterations after this one, which are to be done again."""
        while self._before and self._before[-1][0] > iteration:
            self._before.pop()
