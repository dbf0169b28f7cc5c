"""The course of a run: which iteration, which sample and which token are reached together.

Between two corners, where the global batch or the sequence length changed, an iteration is always as many samples and
a sample as many tokens, so that each count is a piecewise linear function of any other:

    iterations    0 ------- 100 ------------- 300 ...      batch 4, then 8
    samples       0 ------- 400 ------------ 2000 ...
"""

from bisect import bisect_right
from dataclasses import dataclass

UNITS = ("iters", "samples", "tokens")
Counts = tuple[int, int, int]
"""So many iterations, samples and tokens."""


@dataclass(frozen=True)
class Course:
    """The start and the changes of batch or length, in order, and what an iteration adds after the last of them."""

    corners: tuple[Counts, ...]
    step: Counts

    @classmethod
    def straight(cls, global_batch_size: int, seq_length: int) -> "Course":
        """The course of a run that keeps its batch and length."""
        return cls(((0, 0, 0),), (1, global_batch_size, global_batch_size * seq_length))

    def convert(self, length: float, unit: str, other: str) -> float:
        """Return what the count in `other` is when that in `unit` is `length`."""
        if unit == other:
            return length
        known, wanted = UNITS.index(unit), UNITS.index(other)
        last = max(bisect_right([corner[known] for corner in self.corners], length) - 1, 0)
        start, step = self.corners[last], self.step
        if last + 1 < len(self.corners):
            end = self.corners[last + 1]
            step = (end[0] - start[0], end[1] - start[1], end[2] - start[2])
        return start[wanted] + (length - start[known]) * step[wanted] / step[known]
