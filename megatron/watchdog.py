"""Which rank died or hangs, and where: ranks tell each other how far they are, and the slowest of all is named.

Every rank has a thread that writes its position to a key-value store now and then and reads those of the others. A
rank that no longer writes is gone; one that writes and does not move hangs. A rank that waits for another does not move
either, so of those that do not, the ones that have moved least are named. The thread needs neither a device nor a
collective, so it speaks where all else is blocked.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from megatron.logging.progress import StepProgress

EXIT_CODE = 4  # of a run that another rank has ended
LONGEST_INTERVAL_SECONDS = 5.0
STORE = "rank 0, or the launcher that started it, no longer answers"  # which has the store


class Store(Protocol):
    """What of torch.distributed's stores is used."""

    def set(self, key: str, value: str) -> object: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass
class _Seen:
    """What was last read of a rank, and since when it has been the same."""

    beats: int = -1
    moves: int = -1
    place: str = "the preparation of its first step"
    is_done: bool = False
    alive_at: float = 0.0
    moved_at: float = 0.0


class Watchdog:
    """One per rank, from before its first step to after its last."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        limit_seconds: float,
        give_up: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`give_up` is called once, in the thread, with what is to be said; it should end the process."""
        self._store, self._rank, self._limit, self._give_up, self._clock = store, rank, limit_seconds, give_up, clock
        self._beats = self._moves = 0
        self._may_rest = False
        self.place = _Seen.place
        self._seen = [_Seen(alive_at=clock(), moved_at=clock()) for _ in range(world_size)]
        self._closed = threading.Event()
        self._verdict: str | None = None
        self._looked_at = clock()
        # Two threads, as a store whose machine hangs holds the one that asks it for ever.
        self._threads = [
            threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True)
            for target in (self._keep_looking, self._keep_judging)
        ]

    def start(self) -> None:
        """Watch from now on, where there is more than one rank."""
        if len(self._seen) > 1:
            self._looked_at = self._clock()
            for thread in self._threads:
                thread.start()

    def move(self, place: str) -> None:
        """Say that this rank has come to a place. Costs nothing worth counting."""
        self.place = place
        self._moves += 1

    @contextmanager
    def resting(self, place: str) -> Iterator[None]:
        """Within, this rank is in a place that takes as long as it takes: a disk."""
        self.move(place)
        self._may_rest = True
        try:
            yield
        finally:
            self._may_rest = False

    def close(self) -> None:
        """This rank is through; whoever is not may take as long as it likes."""
        self._closed.set()
        looking, judging = self._threads
        if judging.ident is None:
            return
        judging.join()
        looking.join(LONGEST_INTERVAL_SECONDS)
        if not looking.is_alive():
            with suppress(Exception):  # the store may have gone with the rank that has ended the run
                self._write(is_done=True)

    def _keep_looking(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self._verdict = self.look()
            except Exception as error:
                self._verdict = f"{STORE} ({error})"
            self._looked_at = self._clock()

    def _keep_judging(self) -> None:
        while not self._closed.wait(self._interval):
            is_held = self._clock() - self._looked_at > self._limit
            verdict = self._verdict or (STORE if is_held else None)
            if verdict:
                self._give_up(f"{verdict}; this rank was in {self.place}")
                return

    @property
    def _interval(self) -> float:
        return min(self._limit / 4, LONGEST_INTERVAL_SECONDS)

    def look(self) -> str | None:
        """Write where this rank is, read where the others are, and return what is wrong, if anything is."""
        self._write(is_done=False)
        now = self._clock()
        for rank, seen in enumerate(self._seen):
            self._read(rank, seen, now)
        running = [(rank, seen) for rank, seen in enumerate(self._seen) if not seen.is_done]
        gone = [(rank, seen) for rank, seen in running if now - seen.alive_at > self._limit]
        if gone:
            return f"{_named(gone)} no longer answers"
        still = [(rank, seen) for rank, seen in running if now - seen.moved_at > self._limit]
        if still:
            fewest = min(seen.moves for _, seen in still)
            slowest = [(rank, seen) for rank, seen in still if seen.moves == fewest]
            return f"{_named(slowest)} has not moved for {self._limit / 60:.3g} minutes"
        return None

    def _write(self, is_done: bool) -> None:
        self._beats += 1
        self._moves += self._may_rest
        self._store.set(f"watchdog/{self._rank}", json.dumps([self._beats, self._moves, self.place, is_done]))

    def _read(self, rank: int, seen: _Seen, now: float) -> None:
        key = f"watchdog/{rank}"
        if not self._store.check([key]):
            return
        beats, moves, place, is_done = json.loads(self._store.get(key))
        if beats != seen.beats:
            seen.alive_at = now
        if moves != seen.moves:
            seen.moved_at = now
        seen.beats, seen.moves, seen.place, seen.is_done = beats, moves, place, is_done


def _named(ranks: list[tuple[int, _Seen]]) -> str:
    """ "rank 3 (last in ...)", and how many others."""
    (rank, seen), *others = ranks
    more = f" and {len(others)} more, {', '.join(str(rank) for rank, _ in others[:8])}," if others else ""
    return f"rank {rank} (last in {seen.place}){more}"


class WatchedProgress:
    """A step's progress that the watchdog hears of too."""

    def __init__(self, progress: StepProgress, watchdog: Watchdog) -> None:
        self._progress, self._watchdog = progress, watchdog
        self._iteration = 0

    def start_step(self, iteration: int, total_units: int) -> None:
        self._iteration = iteration
        self._watchdog.move(f"iteration {iteration}")
        self._progress.start_step(iteration, total_units)

    def advance(self, phase: str, layer: int, chunk: int) -> None:
        self._watchdog.move(f"iteration {self._iteration}, {phase} layer {layer} chunk {chunk}")
        self._progress.advance(phase, layer, chunk)

    def finish_step(self) -> None:
        self._watchdog.move(f"the end of iteration {self._iteration}")
        self._progress.finish_step()
