"""Watchdog that names the rank that died, hangs or failed, and where: rank 0 watches all, every rank watches rank 0.

Every rank has a thread that writes its position to a key-value store at intervals. A rank that no longer writes has
died; a rank that writes and does not move hangs. A rank that waits for another one does not move either. So only the
ranks that have moved least are judged, and among these the ones that are not inside a collective. Rank 0 writes its
verdict to the store, and every other rank ends with the same message. The threads need neither a device nor a
collective, so they can report while everything else is blocked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Protocol

from megatron.logging.progress import StepProgress, StepWork
from megatron.ranks.activity import is_in_collective, work_done

EXIT_CODE = 4  # of a run in which a rank died or hangs
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells have it
LONGEST_INTERVAL_SECONDS = 5.0
PATIENCE = 0.75  # share of the time limit: the rest is for polling, reporting and ending
SECONDS_FOR_OTHERS = 10.0  # for the failed rank to report, and for the launcher to end the others
VERDICT = "watchdog/verdict"


class Store(Protocol):
    """The part of torch.distributed's stores that is used."""

    def set(self, key: str, value: str) -> object: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


@dataclass(frozen=True)
class Verdict:
    """Why a run ends."""

    text: str
    exit_code: int = EXIT_CODE
    speaker: int | None = None
    """The rank that reports this itself, because it failed or was interrupted."""


class RankLost(Exception):
    """Another rank died, hangs or did not join."""


@dataclass
class _State:
    """The state that a rank writes to the store."""

    beats: int = -1
    moves: int = 0
    """Places reached: the same count on all ranks at the same place."""
    work: int = 0
    """Grows while the rank works in a long operation."""
    place: str = "joining"
    is_waiting: bool = False
    is_hurried: bool = False
    is_done: bool = False


@dataclass
class _Seen:
    """The last state read of a rank, and the times of its last heartbeat and its last move."""

    alive_at: float
    moved_at: float
    state: _State


class Watchdog:
    """The watchdog of a rank, from before it joins the others to after its last step."""

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        end: Callable[[Verdict, Watchdog], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        record_place: Callable[[str], object] | None = None,
    ) -> None:
        """Set up; `end` is called once, in a thread. It should end the process, as the default does.

        `record_place` gets every place that this rank reaches.
        """
        self._rank, self._world_size, self._clock = rank, world_size, clock
        self._end = end or end_process
        self._record_place = record_place or (lambda place: None)
        self._state = _State()
        self._record_place(self._state.place)
        self._is_working = False
        self._work_done = work_done()
        self._seen: list[_Seen] = []
        self._store: Store | None = None
        self._server: Store | None = None
        self._limit = 0.0
        self._closed, self._wake = threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._looked_at = clock()
        self._threads: list[threading.Thread] = []
        self._can_speak = self._store_is_lost = False

    @property
    def place(self) -> str:
        """The place that this rank is in."""
        return self._state.place

    @property
    def rank(self) -> int:
        return self._rank

    def start(self, limit_seconds: float, connect: Callable[[], Store], server: Store | None = None) -> None:
        """Start watching, where there is more than one rank; `connect` is called in a thread.

        The watchdog holds on to `server`, which the other ranks connect to, for as long as they may need it.
        """
        self._server = server
        if self._world_size == 1:
            return
        self.prepare(limit_seconds)
        # Two threads: a store on a machine that hangs blocks its reader forever.
        self._threads = [
            threading.Thread(target=self._keep_looking, args=(connect,), name="watchdog, looking", daemon=True),
            threading.Thread(target=self._keep_judging, name="watchdog, judging", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def prepare(self, limit_seconds: float, store: Store | None = None) -> None:
        """Start the clocks of all ranks."""
        self._limit, self._store, now = PATIENCE * limit_seconds, store, self._clock()
        self._looked_at = now
        self._seen = [_Seen(now, now, _State()) for _ in range(self._world_size)]

    def move(self, place: str) -> None:
        """Record that this rank has reached a place; all ranks reach them in one order. The cost is negligible."""
        self._state.place = place
        self._state.moves += 1
        self._record_place(place)

    def enter(self, place: str) -> None:
        """Record the start of a long operation, and publish it at once."""
        self.move(place)
        self._wake.set()

    @contextmanager
    def working(self, place: str) -> Iterator[None]:
        """Run an operation that may take any time, as long as this rank computes, reads or writes."""
        self.enter(place)
        self._is_working = True
        try:
            yield
        finally:
            self._is_working = False
            self._state.moves += 1

    def hurry(self) -> None:
        """Count a rank as gone after a few silent beats, from now on: the launcher is ending the run."""
        self._state.is_hurried = True

    def fail(self, text: str, exit_code: int) -> bool:
        """Report that this rank has failed, and stop watching; return whether it is the first to end the run."""
        self._stop()
        own = Verdict(f"{self._named([self._rank])} {text}", exit_code, self._rank)
        counting = [own]
        if self._can_speak:
            self._briefly(lambda: counting.append(self._publish(own)))
        return counting[-1] == own

    def wait_for_verdict(self) -> None:
        """After an error in this rank: end once another rank proves to be the cause; return if none does."""
        if not self._threads:
            return
        self.hurry()
        deadline = self._clock() + self._grace + 4 * self._interval
        while self._verdict is not None or self._clock() < deadline:
            time.sleep(self._interval / 4)  # the thread that judges ends the process

    def close(self) -> None:
        """Stop watching: this rank is done, and the others may take any time."""
        self._stop()
        if self._can_speak:
            self.leave()

    def _stop(self) -> None:
        """Stop the threads, if they run."""
        self._closed.set()
        self._wake.set()
        if not self._threads:
            return
        looking, judging = self._threads
        judging.join()
        looking.join(LONGEST_INTERVAL_SECONDS)
        self._can_speak = self._store is not None and not looking.is_alive()
        self._threads = []

    def leave(self) -> None:
        """Report that this rank is done. Rank 0 may own the store, so it waits until the others have read this."""
        if self._store_is_lost:
            return
        self._briefly(lambda: self._write(is_done=True))
        if self._rank == 0:
            self._briefly(self._wait_for_others)

    def _wait_for_others(self) -> None:
        deadline = self._clock() + 2 * self._interval + 1
        while self._clock() < deadline:
            for rank, seen in enumerate(self._seen):
                self._read(rank, seen, self._clock())
            if all(seen.state.is_done for seen in self._seen):
                return
            time.sleep(self._interval / 10)

    def _briefly(self, work: Callable[[], object]) -> None:
        """Try work that may fail or hang: the store may have died with the rank that ended the run."""

        def attempt() -> None:
            with suppress(Exception):
                work()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(2 * LONGEST_INTERVAL_SECONDS + 1)

    def _keep_looking(self, connect: Callable[[], Store]) -> None:
        try:
            self._store = connect()
            while self._verdict is None:
                self._verdict = self.look()
                self._looked_at = self._clock()
                self._wake.wait(self._interval)
                if self._closed.is_set():
                    return
                self._wake.clear()
        except Exception as error:
            self._verdict = self._store_lost(f" ({_first_line(error)})")

    def _keep_judging(self) -> None:
        while not self._closed.wait(self._interval):
            is_held = self._clock() - self._looked_at > self._limit
            verdict = self._verdict or (self._store_lost() if is_held else None)
            if verdict:
                self._verdict = verdict
                self._end(verdict, self)
                return

    def _store_lost(self, reason: str = "") -> Verdict | None:
        self._store_is_lost = True
        if self._seen[0].state.is_done:
            return None
        if self._seen[0].state.beats < 0 and self._rank:
            return Verdict(f"{self._did_not_join([0])}: what listens at MASTER_ADDR and MASTER_PORT does not answer")
        return Verdict(f"{self._named([0])}, or the launcher that started it, no longer answers{reason}")

    @property
    def _interval(self) -> float:
        return min(self._limit / 20, LONGEST_INTERVAL_SECONDS)

    @property
    def _grace(self) -> float:
        """Seconds of silence after which a rank counts as gone once another fault has occurred."""
        return min(self._limit, max(4 * self._interval, 3.0))

    def look(self) -> Verdict | None:
        """Write the place of this rank, read those of the others, and return a verdict if there is a fault."""
        assert self._store is not None, "there is a store once the threads run"
        self._write(is_done=False)
        if self._store.check([VERDICT]):
            verdict = Verdict(**json.loads(self._store.get(VERDICT)))
            return verdict if verdict.speaker != self._rank else None
        now = self._clock()
        for rank in range(self._world_size) if self._rank == 0 else [0]:
            self._read(rank, self._seen[rank], now)
        found = self._judge(now) if self._rank == 0 else self._judge_first_rank(now)
        return None if found is None else self._publish(found)

    def _judge(self, now: float) -> Verdict | None:
        running = [rank for rank, seen in enumerate(self._seen) if not seen.state.is_done]
        absent = [rank for rank in running if self._seen[rank].state.beats < 0]
        if absent:
            return self._judge_absent(absent, now)
        patience = self._grace if any(seen.state.is_hurried for seen in self._seen) else self._limit
        gone = [rank for rank in running if now - self._seen[rank].alive_at > patience]
        if gone:
            return Verdict(f"{self._named(gone)} no longer answers")
        fewest = min((self._seen[rank].state.moves for rank in running), default=0)
        behind = [rank for rank in running if self._seen[rank].state.moves == fewest]
        slowest = [rank for rank in behind if not self._seen[rank].state.is_waiting] or behind
        if slowest and all(now - self._seen[rank].moved_at > self._limit for rank in slowest):
            silent = [rank for rank in slowest if now - self._seen[rank].alive_at > self._grace]
            if silent:
                return Verdict(f"{self._named(silent)} no longer answers")
            return Verdict(f"{self._named(slowest)} has not moved for {self._limit / 60:.3g} minutes")
        return None

    def _judge_absent(self, absent: Sequence[int], now: float) -> Verdict | None:
        if now - self._seen[absent[0]].alive_at <= self._limit:
            return None
        return Verdict(self._did_not_join(absent))

    def _did_not_join(self, absent: Sequence[int]) -> str:
        ranks = ", ".join(str(rank) for rank in absent[:8]) + (" and others" if len(absent) > 8 else "")
        return f"rank(s) {ranks} of {self._world_size} did not join within {self._limit / 60:.3g} minutes"

    def _judge_first_rank(self, now: float) -> Verdict | None:
        first = self._seen[0]
        if first.state.is_done:
            return None
        if first.state.beats < 0:
            return self._judge_absent([0], now)
        patience = self._grace if self._state.is_hurried else self._limit
        return Verdict(f"{self._named([0])} no longer answers") if now - first.alive_at > patience else None

    def _publish(self, verdict: Verdict) -> Verdict:
        """Write a verdict unless there is one already; return the one that counts."""
        assert self._store is not None, "there is a store once the threads run"
        return Verdict(**json.loads(self._store.compare_set(VERDICT, "", json.dumps(asdict(verdict)))))

    def _write(self, is_done: bool) -> None:
        assert self._store is not None, "there is a store once the threads run"
        state = self._state
        state.beats += 1
        state.is_done = is_done
        state.is_waiting = is_in_collective()
        done = work_done()
        if self._is_working and not state.is_waiting and done.is_well_past(self._work_done):
            state.work += 1
        self._work_done = done
        self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(state)))

    def _read(self, rank: int, seen: _Seen, now: float) -> None:
        assert self._store is not None, "there is a store once the threads run"
        key = f"watchdog/{rank}"
        if not self._store.check([key]):
            return
        state = _State(**json.loads(self._store.get(key)))
        if state.beats != seen.state.beats:
            seen.alive_at = now
        if (state.moves, state.work) != (seen.state.moves, seen.state.work):
            seen.moved_at = now
        seen.state = state

    def _named(self, ranks: Sequence[int]) -> str:
        """Format "rank 3 (last in ...)", and the number of other ranks."""
        first, *others = ranks
        state = self._state if first == self._rank else self._seen[first].state
        more = f" and {len(others)} more, {', '.join(str(rank) for rank in others[:8])}," if others else ""
        return f"rank {first} (last in {state.place}){more}"


def end_process(verdict: Verdict, watchdog: Watchdog) -> None:
    """Report the verdict, and end at once: the main thread may be blocked forever."""
    if verdict.exit_code != INTERRUPTED_EXIT_CODE:
        if verdict.speaker is not None:
            time.sleep(SECONDS_FOR_OTHERS)
        sys.stderr.write(f"error on rank {watchdog.rank}: {verdict.text}; this rank was in {watchdog.place}\n")
        sys.stderr.flush()
    watchdog.leave()
    os._exit(verdict.exit_code)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class WatchedProgress:
    """Progress of a step that also reports to the watchdog."""

    def __init__(self, progress: StepProgress, watchdog: Watchdog) -> None:
        self._progress, self._watchdog = progress, watchdog
        self._iteration = 0

    def start_step(self, iteration: int, work: StepWork) -> None:
        self._iteration = iteration
        self._watchdog.move(f"iteration {iteration}")
        self._progress.start_step(iteration, work)

    def advance(self, phase: str, layer: int, chunk: int) -> None:
        self._watchdog.move(f"iteration {self._iteration}, {phase} layer {layer} chunk {chunk}")
        self._progress.advance(phase, layer, chunk)

    def finish_step(self) -> None:
        self._watchdog.move(f"the end of iteration {self._iteration}")
        self._progress.finish_step()
