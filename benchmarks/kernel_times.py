"""Where a contestant's time goes, kernel by kernel, as the GPU's own trace has it.

Kernels are sorted into kinds by their names. "waiting" is the time from the first kernel to the last in which no kernel
ran, copies not counted: what copies, or the host that queues the work, did not hide.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

COPIES = "copies"

# The first that matches counts. The attention packages call their backward passes bwd, bprop or backward.
_KINDS = (
    (COPIES, r"^Mem(cpy|set) "),
    ("attention backward", r"(flash|fmha|sdpa).*(bwd|bprop|backward)|compute_dot_do_o|convert_dq|reduce_head"),
    ("attention forward", r"flash|fmha|sdpa"),
    ("matrix products", r"gemm|nvjet|splitK"),
    ("other", r""),
)


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel or copy, in nanoseconds of the GPU's clock."""

    name: str
    start: int
    duration: int

    @property
    def kind(self) -> str:
        return next(kind for kind, pattern in _KINDS if re.search(pattern, self.name))


def trace(work: Callable[[], Any]) -> list[Kernel]:
    """What the GPU ran for `work`."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    return [
        Kernel(event.name(), event.start_ns(), event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]


def seconds_by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Seconds per kind, and those of waiting. Copies run beside the rest."""
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    sums: Counter[str] = Counter()
    for kernel in kernels:
        sums[kernel.kind] += kernel.duration
    computing = [kernel for kernel in kernels if kernel.kind != COPIES]
    sums["waiting"] = sum(_gaps(computing))
    return {kind: nanoseconds / 1e9 for kind, nanoseconds in sums.items()}


def _gaps(kernels: Iterable[Kernel]) -> Iterable[int]:
    """Nanoseconds in which none of the kernels, sorted by their start, runs."""
    end = None
    for kernel in kernels:
        if end is not None:
            yield max(kernel.start - end, 0)
        end = max(kernel.start + kernel.duration, end or 0)


def seconds_by_name(kernels: Iterable[Kernel], most: int = 25) -> list[tuple[float, int, str]]:
    """(seconds, runs, name) of the kernels that took the longest."""
    seconds: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for kernel in kernels:
        seconds[kernel.name] += kernel.duration
        runs[kernel.name] += 1
    return [(nanoseconds / 1e9, runs[name], name) for name, nanoseconds in seconds.most_common(most)]
