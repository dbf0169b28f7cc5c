"""Items made ahead of their use by a thread: reading samples and making batches run beside the training step.

A thread is enough: copying out of a memory map and slicing let go of the interpreter's lock. The order is that of the
iterator, whatever the depth, and items that were made and not taken leave no trace, so a run that goes on from the
samples consumed takes up exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Semaphore, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

LONGEST_WAIT_SECONDS = 30.0


class _End:
    """What comes after the last item: the error that ended the iterator, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[Item]):
    """An iterator over `items`, of which at most `depth` are made and not yet taken; depth 0 makes each when asked.

    `items` runs in the thread alone. An error of it is raised, itself and with its traceback, where its item would
    have come. A context manager: leaving the block ends the thread, once it has finished the item at hand;
    one that takes longer than LONGEST_WAIT_SECONDS is left to itself.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._made: SimpleQueue[Item | _End] = SimpleQueue()
        self._room = Semaphore(depth)
        self._closed = False
        self._end: _End | None = None
        # A daemon, so that a read that never returns does not keep the process from ending.
        self._thread = Thread(target=self._make, name="prefetch", daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        if self._thread is None:
            return next(self._items)
        if self._end is None:
            item = self._made.get()
            if not isinstance(item, _End):
                self._room.release()
                return item
            self._end = item
        raise self._end.error or StopIteration

    def close(self) -> None:
        """End the thread and drop what it has made."""
        if self._thread is None:
            return
        self._closed = True
        self._room.release()
        self._thread.join(LONGEST_WAIT_SECONDS)
        self._made = SimpleQueue()
        self._end = self._end or _End(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._made.put(next(self._items))
        except StopIteration:
            self._made.put(_End(None))
        except BaseException as error:
            self._made.put(_End(error))
