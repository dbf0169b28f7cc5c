"""CPU time limit for untrusted code, such as a template with an endless loop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class TimeLimitExceeded(BaseException):
    """A block exceeded its CPU time; not an Exception, which untrusted code may catch."""


@contextmanager
def cpu_time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded within the block after `seconds` of this process's CPU time.

    Time of other processes does not count. Signals reach only the main thread: in other threads there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise TimeLimitExceeded(f"it takes more than {seconds:g} seconds")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
