"""State of the main thread, seen from another thread: whether it works, and whether it waits in a collective."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Polling while waiting costs less than these.
LEAST_SHARE = 0.01
LEAST_BYTES = 2**16
# A thread inside these files waits for other ranks.
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "megatron/core/collectives.py")


@dataclass(frozen=True)
class Work:
    """Work done since the start of the process."""

    at: float
    cpu_seconds: float
    """Of the main thread."""
    num_bytes: int
    """Read from and written to files and pipes."""

    def is_well_past(self, before: Work) -> bool:
        """Return whether more was done since `before` than polling costs."""
        cpu, seconds = self.cpu_seconds - before.cpu_seconds, self.at - before.at
        return cpu > LEAST_SHARE * seconds or self.num_bytes - before.num_bytes > LEAST_BYTES


def work_done() -> Work:
    """Measure the work of this process up to now."""
    cpu_seconds, num_bytes = 0.0, 0
    thread = threading.main_thread().ident
    with suppress(OSError):
        if thread is not None:
            cpu_seconds = time.clock_gettime(time.pthread_getcpuclockid(thread))
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        num_bytes = sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    return Work(time.monotonic(), cpu_seconds, num_bytes)


def is_in_collective() -> bool:
    """Return whether the main thread is inside a collective, which ends once the other ranks have joined it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(COLLECTIVES):
            return True
        frame = frame.f_back
    return False
