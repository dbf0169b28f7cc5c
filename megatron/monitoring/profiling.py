"""Profile of some iterations (--profile): a trace for Perfetto, and a summary of the time as text and JSON.

    DIR/rank0-iterations-11-12.trace.json.gz      open it in https://ui.perfetto.dev or chrome://tracing
    DIR/rank0-iterations-11-12.summary.json

On a GPU the seconds are those of kernels and copies, which overlap. On the CPU they are those of the named ranges of
megatron.core.ranges.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from megatron.config.logging import LoggingConfig
from megatron.core.ranges import ALL_TO_ALL, ATTENTION, COPY_IN, COPY_OUT, LOSS, TOKEN_WISE
from megatron.initialize import Context
from megatron.monitoring.kernel_times import (
    Kernel,
    exclusive_seconds,
    hidden_copies,
    kernels_of,
    ranges_of,
    seconds_by_kind,
    seconds_by_name,
)

KINDS_OF_RANGES = (ATTENTION, TOKEN_WISE, ALL_TO_ALL, COPY_IN, COPY_OUT, LOSS)
LONGEST = 10  # kernels that a summary names
LONGEST_FIELDS = ("seconds", "runs", "name")

Summary = dict[str, Any]


class StepProfiler:
    """Profiles the iterations that the settings ask for, on the ranks that they ask for."""

    def __init__(self, settings: LoggingConfig, context: Context) -> None:
        self._context = context
        self._first, self._last = settings.profile_step_start + 1, settings.profile_step_end
        self._enabled = bool(settings.profile) and context.parallel_state.rank in settings.profile_ranks
        self._with_stack = settings.profile == "pt-full"
        self._folder = Path(settings.profile_dir or settings.tensorboard_dir or ".")
        self._profile: torch.profiler.profile | None = None
        self._started, self._iterations = 0.0, (0, 0)

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Profile the iteration that runs in this context; the last one, or `close`, writes the result."""
        if not self._enabled or not self._first <= iteration <= self._last:
            yield
            return
        if self._profile is None:
            self._start(iteration)
        self._iterations = self._iterations[0], iteration
        yield
        if iteration == self._last:
            self.close()

    def _start(self, iteration: int) -> None:
        self._synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (self._context.device.type == "cuda")
        self._profile = torch.profiler.profile(activities=activities, with_stack=self._with_stack)
        self._profile.start()
        self._started, self._iterations = time.monotonic(), (iteration, iteration)

    def close(self) -> None:
        """Stop the profile and write it, if one is running."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        self._synchronize()
        seconds = time.monotonic() - self._started
        profile.stop()
        summary = summarize(kernels_of(profile), ranges_of(profile))
        summary = {"iterations": list(self._iterations), "seconds": seconds, **summary}
        for line in lines_of(summary):
            self._context.log.info("%s", line)
        self._write(profile, summary)

    def _write(self, profile: torch.profiler.profile, summary: Summary) -> None:
        """Write trace and summary, and log their paths; a failure to write them does not stop the training."""
        first, last = self._iterations
        stem = self._folder / f"rank{self._context.parallel_state.rank}-iterations-{first}-{last}"
        trace, text = Path(f"{stem}.trace.json.gz"), Path(f"{stem}.summary.json")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            text.write_text(json.dumps(summary, indent=2) + "\n")
            profile.export_chrome_trace(str(trace))
        except (OSError, RuntimeError) as error:  # RuntimeError: from the profiler's own writer
            for path in (trace, text):
                with suppress(OSError):
                    path.unlink()
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            self._context.log.warning("--profile cannot write %s..: %s; training continues without it", stem, reason)
            return
        self._context.log.info("timeline: %s (open it in https://ui.perfetto.dev)", trace)

    def _synchronize(self) -> None:
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)


def summarize(kernels: list[Kernel], ranges: list[Kernel]) -> Summary:
    """Summarize seconds by kind of kernel, or of range where no kernels ran, and the overlap of the copies."""
    if not kernels:
        return {"seconds_by_kind": _seconds_by_kind_of_range(ranges), "copies": None}
    copies = hidden_copies(kernels)
    hidden_share = copies.hidden_seconds / copies.seconds if copies.seconds else None
    return {
        "seconds_by_kind": seconds_by_kind(kernels),
        "copies": {"seconds": copies.seconds, "hidden_share": hidden_share},
        "longest": [dict(zip(LONGEST_FIELDS, row, strict=True)) for row in seconds_by_name(kernels, LONGEST)],
    }


def _seconds_by_kind_of_range(ranges: list[Kernel]) -> dict[str, float]:
    """Sum by kind of range; blocks, chunks and passes, without the kinds nested in them, count as other."""
    totals: defaultdict[str, float] = defaultdict(float)
    for name, seconds in exclusive_seconds(ranges).items():
        totals[name if name in KINDS_OF_RANGES else "other"] += seconds
    return dict(totals)


def lines_of(summary: Summary) -> list[str]:
    """Format the summary as lines of text."""
    (first, last), copies = summary["iterations"], summary["copies"]
    lines = [f"profile of iterations {first} to {last}: {summary['seconds']:.3f} s"]
    by_kind = sorted(summary["seconds_by_kind"].items(), key=lambda item: -item[1])
    lines += [f"  {kind:20s} {seconds:10.3f} s" for kind, seconds in by_kind]
    if copies is None:
        lines.append("  no GPU: seconds of the host; chunks are not copied to a device, so there is nothing to hide")
    elif copies["hidden_share"] is None:
        lines.append("  nothing was copied between GPU and host")
    else:
        seconds, share = copies["seconds"], copies["hidden_share"]
        lines.append(f"  between GPU and host {seconds:.3f} s of copies, {share:.1%} of them overlapped with compute")
    return lines
