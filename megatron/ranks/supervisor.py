"""Supervisor of a rank: a small parent process that reports the signal that killed the rank.

The `deepspeed` launcher ends with the exit code of the first process that it finds ended. A rank that SIGKILL ends can
report nothing, and the launcher's code would be 247. So the process that the launcher starts forks before it imports
anything large: the child is the rank, the parent waits for it. The kernel's out-of-memory killer chooses the child.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable

from megatron.ranks.watchdog import EXIT_CODE

LAUNCHER_VARIABLE = "CROSS_SIZE"  # set by the launcher of DeepSpeed alone
PROFILER_VARIABLE = "CUDA_INJECTION64_PATH"  # Nsight Systems follows no child that does not call exec
REQUESTS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class LastPlace:
    """The last place that a rank has reached, in memory shared with its supervisor."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.record("starting")

    def record(self, place: str) -> None:
        """Record a place, without a system call: every chunk is one. What exceeds a page is cut off."""
        text = place.encode(errors="backslashreplace")[: len(self._memory) - 1] + b"\0"
        self._memory[: len(text)] = text

    def read(self) -> str:
        """Return the place recorded last, also after the rank's death."""
        return self._memory[:].partition(b"\0")[0].decode(errors="ignore")


def supervise() -> Callable[[str], object] | None:
    """Continue in a child process where the `deepspeed` launcher started this one.

    Call it before anything large is imported. The child receives the function that records its last place, a process
    without a supervisor None. The parent does not return: it exits as the child does, or with EXIT_CODE and a line on
    stderr after a signal that was no request to end. The kernel kills a child whose parent dies.
    """
    if LAUNCHER_VARIABLE not in os.environ or PROFILER_VARIABLE in os.environ:
        return None
    last_place, supervisor = LastPlace(), os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*REQUESTS, signal.SIGCHLD})
    child = os.fork()
    if child:
        code = EXIT_CODE
        try:
            code = _wait_for(child, last_place)
        finally:
            os._exit(code)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return last_place.record


def _wait_for(child: int, last_place: LastPlace) -> int:
    """Forward requests to end until the child has ended; return the exit code of the supervisor."""
    is_being_ended = False
    while True:
        received = signal.sigwaitinfo({*REQUESTS, signal.SIGCHLD})
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
        elif received.si_code <= 0:  # sent by a process; the terminal's Ctrl-C reaches the child by itself
            os.kill(child, received.si_signo)
            is_being_ended = True
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if -code in REQUESTS:
        return 128 - code
    _report(-code, last_place.read(), is_being_ended)
    return EXIT_CODE


def _report(number: int, place: str, is_being_ended: bool) -> None:
    """Report the signal that killed the rank, and where."""
    name = {each.value: each.name for each in signal.Signals}.get(number, f"signal {number}")
    reason = ""
    if is_being_ended:
        reason = ", after a request to end"
    elif number == signal.SIGKILL:
        reason = "; the kernel's out-of-memory killer does this when host memory runs out"
    sys.stderr.write(f"error on rank {os.environ.get('RANK', '0')}: it was killed by {name} in {place}{reason}\n")
    sys.stderr.flush()
