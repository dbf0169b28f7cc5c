"""Lengths of the training samples in the order in which they are read: one length, phases, or groups of one length.

A phase is a span of samples, not of iterations: what a rollback leaves out counts too, so that the phases, and with
them the samples, do not depend on how a run went.

    --seq-length-schedule 32K:1000,128K:500,1M, four sequences per step

    samples    0 ------------ 4000 ------------ 6000 ...
    length         32768             131072            1048576
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from megatron.config.batch import global_batch_size
from megatron.config.config import Config
from megatron.config.errors import ConfigError
from megatron.core.course import Counts, Course
from megatron.core.token_count import parse_token_count

Phase = tuple[int, int]  # first sample, tokens per sample


@dataclass(frozen=True)
class SampleLengths:
    """The phases of a run and its global batch.

    With `is_grouped` the batches of the data have lengths of their own, which at most reach the one phase's.
    """

    phases: tuple[Phase, ...]
    global_batch_size: int
    is_grouped: bool = False

    @property
    def is_scheduled(self) -> bool:
        """Whether there are several phases."""
        return len(self.phases) > 1

    @property
    def vary(self) -> bool:
        """Whether steps may differ in length."""
        return self.is_scheduled or self.is_grouped

    def at(self, sample: int) -> int:
        """Return the length of a sample; of a group the longest."""
        return self.phases[self._phase(sample)][1]

    def after(self, sample: int) -> tuple[Phase, ...]:
        """Return the phases that begin after a sample."""
        return self.phases[self._phase(sample) + 1 :]

    def until(self, sample: int) -> tuple[tuple[Phase, ...], int | None]:
        """Return the phases begun before or at a sample, and where the last of them ends: what their order follows."""
        following = self.after(sample)
        return self.phases[: len(self.phases) - len(following)], following[0][0] if following else None

    def ahead(self, counts: Counts, sample: int) -> Course:
        """Return the course of a run from these counts on, whose next sample is the given one."""
        corners, step = [counts], self._step(self.at(sample))
        for first, length in self.after(sample):
            steps, sample = (first - sample) // self.global_batch_size, first
            iterations, samples, tokens = corners[-1]
            corners.append((iterations + steps, samples + steps * step[1], tokens + steps * step[2]))
            step = self._step(length)
        return Course(tuple(corners), step)

    def steps_from(self, sample: int, num_steps: int) -> list[tuple[int, int]]:
        """Return (tokens per sample, steps) of each phase among the steps that begin with a sample, in order."""
        phases, done, length = list[tuple[int, int]](), 0, self.at(sample)
        for first, after in self.after(sample):
            end = min((first - sample) // self.global_batch_size, num_steps)
            phases.append((length, end - done))
            done, length = end, after
        phases.append((length, num_steps - done))
        return [(length, steps) for length, steps in phases if steps]

    def _step(self, length: int) -> Counts:
        return 1, self.global_batch_size, self.global_batch_size * length

    def _phase(self, sample: int) -> int:
        return bisect_right([first for first, _ in self.phases], sample) - 1


def sample_lengths(config: Config, world_size: int) -> SampleLengths:
    """Return the lengths of the training samples of a run."""
    batch, schedule = global_batch_size(config, world_size), config.training.seq_length_schedule
    if schedule is None:
        return SampleLengths(((0, config.model.seq_length),), batch, config.finetuning.group_by_length)
    phases, first = [], 0
    for length, iterations in parse_schedule(schedule):
        phases.append((first, length))
        first += (iterations or 0) * batch
    return SampleLengths(tuple(phases), batch)


def parse_schedule(text: str) -> list[tuple[int, int | None]]:
    """Return (tokens, iterations) of each phase of a --seq-length-schedule; None iterations, of the last, are the rest.

    Raises:
        ConfigError: the text is no schedule.
    """
    words = [word.partition(":") for word in text.split(",")]
    try:
        phases = [(parse_token_count(length), int(count) if colon else None) for length, colon, count in words]
    except ValueError:
        phases = []
    *before, last = [iterations for _, iterations in phases] or [0]
    if not before or not all(n is not None and n > 0 for n in before) or last is not None:
        raise ConfigError(
            f"--seq-length-schedule ({text}) must give lengths and how many iterations each is trained at, the last "
            "to the end of the training; use for example 32K:1000,128K:500,1M"
        )
    return phases
