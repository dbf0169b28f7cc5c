"""Loss-spike detection: losses that are not finite, or far above the running mean."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 100  # iterations in the running mean
ENOUGH = 10  # iterations needed before a loss can count as a spike


class LossWatch:
    """Checks the loss of every iteration, in order."""

    def __init__(self, spike_factor: float | None) -> None:
        """Report losses above `spike_factor` times the running mean; None: only losses that are not finite."""
        self._spike_factor = spike_factor
        self._before: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # iterations and their losses

    def look(self, iteration: int, loss: float) -> str | None:
        """Return the warning about this loss, or None."""
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
        """Drop the losses of the iterations after this one, which will be repeated after a rollback."""
        while self._before and self._before[-1][0] > iteration:
            self._before.pop()
