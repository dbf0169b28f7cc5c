"""Prefetching in a thread: reading samples and building batches overlaps with the training step.

A thread is enough: copying from a memory map and slicing release the GIL. Items come in the iterator's order, whatever
the depth. Items that were prefetched and not consumed leave no trace, so a run that resumes from the samples consumed
continues exactly where it stopped.
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
    """Marker after the last item: the error that ended the iterator, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[Item]):
    """An iterator over `items` that prefetches at most `depth` of them; depth 0 makes each item on demand.

    `items` runs only in the thread. An error in it is raised, with its traceback, in place of its item. A context
    manager: leaving the block ends the thread once the current item is finished. If that takes longer than
    LONGEST_WAIT_SECONDS, the thread is abandoned.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._made: SimpleQueue[Item | _End] = SimpleQueue()
        self._room = Semaphore(depth)
        self._closed = False
        self._end: _End | None = None
        # A daemon, so that a read that never returns does not prevent the process from ending.
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
        """End the thread and drop the prefetched items."""
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
