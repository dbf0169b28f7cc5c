"""The course of a run: conversion between its counts of iterations, samples and tokens.

A corner is where the global batch or the sequence length changed. Between two corners an iteration always has the same
number of samples and a sample the same number of tokens, so each count is a piecewise linear function of any other:

    iterations    0 ------- 100 ------------- 300 ...      batch 4, then 8
    samples       0 ------- 400 ------------ 2000 ...
"""

from bisect import bisect_right
from dataclasses import dataclass

UNITS = ("iters", "samples", "tokens")
Counts = tuple[int, int, int]
"""Numbers of iterations, samples and tokens."""


@dataclass(frozen=True)
class Course:
    """Corners: the start and the changes of batch or length, in order. `step`: counts per iteration after the last."""

    corners: tuple[Counts, ...]
    step: Counts

    @classmethod
    def straight(cls, global_batch_size: int, seq_length: int) -> "Course":
        """Return the course of a run with constant batch and sequence length."""
        return cls(((0, 0, 0),), (1, global_batch_size, global_batch_size * seq_length))

    def convert(self, length: float, unit: str, other: str) -> float:
        """Return the count in `other` at which the count in `unit` is `length`."""
        if unit == other:
            return length
        known, wanted = UNITS.index(unit), UNITS.index(other)
        start, step = self._part(length, known)
        return start[wanted] + (length - start[known]) * step[wanted] / step[known]

    def last_iteration(self, tokens: int) -> int:
        """Return the last iteration that ends within so many tokens."""
        start, step = self._part(tokens, UNITS.index("tokens"))
        return start[0] + (tokens - start[2]) * step[0] // step[2]

    def _part(self, length: float, unit: int) -> tuple[Counts, Counts]:
        """Return (the last corner up to a count, the counts of steps that follow it)."""
        last = max(bisect_right([corner[unit] for corner in self.corners], length) - 1, 0)
        start = self.corners[last]
        if last + 1 == len(self.corners):
            return start, self.step
        end = self.corners[last + 1]
        return start, (end[0] - start[0], end[1] - start[1], end[2] - start[2])
