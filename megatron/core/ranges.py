"""Named ranges in a profiler trace: the host's phase when it queued the work. No-ops unless a profiler runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

ALL_TO_ALL = "all-to-all"
ATTENTION = "attention"
COPY_IN = "copy in"
COPY_OUT = "copy out"
TOKEN_WISE = "token-wise"
LOSS = "loss"

_OUTSIDE = nullcontext()


def named_range(name: str) -> AbstractContextManager[object]:
    """Return a range in the trace while torch's profiler runs, and a no-op context otherwise."""
    return torch.profiler.record_function(name) if torch.autograd.profiler._is_profiler_enabled else _OUTSIDE
