"""Handling of Ctrl-C and the launcher's SIGTERM, even while the main thread is blocked outside of Python."""

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
    """End the process on SIGINT even if the main thread cannot handle it; on SIGTERM hurry the watchdog.

    Python runs signal handlers only in the main thread, which may wait forever in a collective. A separate thread reads
    the numbers of the signals.
    """
    _restore_keyboard_interrupt()
    ended = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, ended, watchdog), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        writer.close()


def _listen(reader: socket.socket, ended: threading.Event, watchdog: Watchdog) -> None:
    while numbers := reader.recv(64):
        if signal.SIGTERM in numbers:
            watchdog.hurry()
        if signal.SIGINT in numbers and not ended.wait(SECONDS_TO_END):
            os._exit(end_interrupted(watchdog))


def end_interrupted(watchdog: Watchdog) -> int:
    """Report the interrupt on the first rank that ends; return the exit code."""
    if watchdog.fail("was interrupted", INTERRUPTED_EXIT_CODE):
        sys.stderr.write("interrupted\n" if watchdog.rank == 0 else f"interrupted on rank {watchdog.rank}\n")
        sys.stderr.flush()
    return INTERRUPTED_EXIT_CODE


def end_on_interrupt() -> None:
    """End on Ctrl-C at once while a script imports; leave SIGINT alone where it is ignored or handled already."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def run_tool(main: Callable[[], int]) -> int:
    """Call a tool's main function and return its exit code; Ctrl-C prints one line and has its own code."""
    try:
        _restore_keyboard_interrupt()
        return main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED_EXIT_CODE


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED_EXIT_CODE)


def _restore_keyboard_interrupt() -> None:
    """Undo `end_on_interrupt`: from here on, half-written files must be cleaned up."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
