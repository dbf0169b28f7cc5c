"""Time by kind from a profiler's trace: kernels and copies on the GPU, and named ranges on the host.

Kernels are sorted into kinds by their names. "waiting" is the time between the first and the last kernel in which no
kernel ran; copies do not count as kernels. It is the exposed time of copies, or of the host that queues the work.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch

COPIES = "copies"
COLLECTIVES = "collectives"

# The first match counts. The attention packages call their backward passes bwd, bprop or backward.
_KINDS = (
    (COPIES, r"^Mem(cpy|set) "),
    (COLLECTIVES, r"^nccl"),
    ("attention backward", r"(flash|fmha|sdpa).*(bwd|bprop|backward)|compute_dot_do_o|convert_dq|reduce_head"),
    ("attention forward", r"flash|fmha|sdpa"),
    ("matrix products", r"gemm|nvjet|splitK"),
    ("other", r""),
)
_LINK = re.compile(r"^Memcpy (HtoD|DtoH)")

Span = tuple[int, int]  # first nanosecond, and one past the last


@dataclass(frozen=True)
class Kernel:
    """One launch of a kernel or copy, in nanoseconds of the GPU's clock."""

    name: str
    start: int
    duration: int

    @property
    def kind(self) -> str:
        return next(kind for kind, pattern in _KINDS if re.search(pattern, self.name))

    @property
    def end(self) -> int:
        return self.start + self.duration


@dataclass(frozen=True)
class Copies:
    """Seconds of the copies between GPU and host, and the seconds of them that overlapped with compute."""

    seconds: float
    hidden_seconds: float


def kernels_of(profile: torch.profiler.profile) -> list[Kernel]:
    """Return the kernels and copies that the GPU ran in a finished profile."""
    return [
        Kernel(event.name(), event.start_ns(), event.duration_ns())
        for event in _events(profile)
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]


def ranges_of(profile: torch.profiler.profile) -> list[Kernel]:
    """Return the named ranges of this thread (megatron.core.ranges) in a finished profile.

    Libraries name ranges of their own in other threads, which run during those of this one and not within them.
    """
    thread = threading.get_native_id()
    return [
        Kernel(event.name(), event.start_ns(), event.duration_ns())
        for event in _events(profile)
        if event.device_type() == torch.autograd.DeviceType.CPU
        and event.is_user_annotation()
        and event.device_resource_id() == thread
    ]


def _events(profile: torch.profiler.profile) -> Iterable[torch._C._autograd._KinetoEvent]:
    results = profile.profiler and profile.profiler.kineto_results
    return results.events() if results else ()


def seconds_by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Sum seconds per kind, and those of waiting. Copies overlap with the other kinds."""
    kernels = list(kernels)
    totals: Counter[str] = Counter()
    for kernel in kernels:
        totals[kernel.kind] += kernel.duration
    busy = _merged(kernel for kernel in kernels if kernel.kind != COPIES)
    totals["waiting"] = sum(start - end for (_, end), (start, _) in pairwise(busy))
    return {kind: nanoseconds / 1e9 for kind, nanoseconds in totals.items()}


def hidden_copies(kernels: Iterable[Kernel]) -> Copies:
    """Measure the copies over the link, and their overlap with compute: kernels that are not collectives."""
    kernels = list(kernels)
    computing = _merged(kernel for kernel in kernels if kernel.kind not in (COPIES, COLLECTIVES))
    copies = [kernel for kernel in kernels if _LINK.search(kernel.name)]
    hidden = sum(_overlap((copy.start, copy.end), computing) for copy in copies)
    return Copies(sum(copy.duration for copy in copies) / 1e9, hidden / 1e9)


def _merged(kernels: Iterable[Kernel]) -> list[Span]:
    """Return the spans in which any of the kernels runs, ascending and disjoint."""
    spans: list[Span] = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if spans and kernel.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], kernel.end)
        else:
            spans.append((kernel.start, kernel.end))
    return spans


def _overlap(span: Span, others: list[Span]) -> int:
    """Return the nanoseconds of a span that overlap with `others`, which are ascending and disjoint."""
    common = 0
    for start, end in others[bisect_right(others, span[0], key=lambda other: other[1]) :]:
        if start >= span[1]:
            break
        common += min(end, span[1]) - max(start, span[0])
    return common


def seconds_by_name(kernels: Iterable[Kernel], most: int = 25) -> list[tuple[float, int, str]]:
    """Return (seconds, launches, name) of the kernels that took the longest."""
    seconds: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for kernel in kernels:
        seconds[kernel.name] += kernel.duration
        runs[kernel.name] += 1
    return [(nanoseconds / 1e9, runs[name], name) for name, nanoseconds in seconds.most_common(most)]


def exclusive_seconds(ranges: Iterable[Kernel]) -> dict[str, float]:
    """Sum seconds by name of ranges, so that each instant counts once: for the last range to begin of those open.

    A range therefore excludes those nested in it. Ranges of several threads may overlap in any way.
    """
    ordered = sorted(ranges, key=lambda each: (each.start, -each.duration))
    totals = Counter({each.name: 0 for each in ordered})
    open_ranges: list[Kernel] = []
    now = 0
    for each, following in zip_longest(ordered, ordered[1:]):
        open_ranges.append(each)
        now = each.start
        while open_ranges and (following is None or now < following.start):
            last = open_ranges[-1]
            until = last.end if following is None else min(last.end, following.start)
            totals[last.name] += max(until - now, 0)
            now = max(now, until)
            if last.end <= now:
                open_ranges.pop()
    return {name: nanoseconds / 1e9 for name, nanoseconds in totals.items()}
