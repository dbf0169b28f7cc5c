"""Ctrl-C and the launcher's SIGTERM, also where the main thread is blocked outside of Python."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron.ranks.watchdog import INTERRUPTED_EXIT_CODE, Watchdog

SECONDS_TO_END = 5.0


@contextmanager
def interruptible(watchdog: Watchdog) -> Iterator[None]:
    """Within, SIGINT ends the process even if the main thread does not hear of it, and SIGTERM hurries the watchdog.

    Python runs signal handlers in the main thread alone, which may wait for a collective for ever. A thread of its own
    reads the numbers of the signals.
    """
    _raise_from_now_on()
    ended = threading.Event()
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(heard, ended, watchdog), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        told.close()


def _listen(heard: socket.socket, ended: threading.Event, watchdog: Watchdog) -> None:
    while numbers := heard.recv(64):
        if signal.SIGTERM in numbers:
            watchdog.hurry()
        if signal.SIGINT in numbers and not ended.wait(SECONDS_TO_END):
            os._exit(end_interrupted(watchdog))


def end_interrupted(watchdog: Watchdog) -> int:
    """Say so on the first rank that ends; returns the exit code."""
    if watchdog.fail("was interrupted", INTERRUPTED_EXIT_CODE):
        sys.stderr.write("interrupted\n" if watchdog.rank == 0 else f"interrupted on rank {watchdog.rank}\n")
        sys.stderr.flush()
    return INTERRUPTED_EXIT_CODE


def end_on_interrupt() -> None:
    """While a script imports, Ctrl-C ends it at once; where SIGINT is ignored or handled already, that stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def run_tool(main: Callable[[], int]) -> int:
    """Call a tool's main function and return its exit code; Ctrl-C is one line and a code of its own."""
    try:
        _raise_from_now_on()
        return main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED_EXIT_CODE


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED_EXIT_CODE)


def _raise_from_now_on() -> None:
    """End what `end_on_interrupt` began: files that are half written are to be cleaned up."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
