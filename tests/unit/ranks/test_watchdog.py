"""Ranks that die, hang or never come are named. Time is a number here, and no thread runs but in the last tests."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import megatron.ranks.watchdog
from megatron.ranks.activity import Work, is_in_collective, work_done
from megatron.ranks.watchdog import PATIENCE, Verdict, Watchdog

LIMIT = 80.0
PATIENT = PATIENCE * LIMIT  # one minute


class Memory:
    """A store."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.is_broken = False

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        if self.is_broken:
            raise RuntimeError("Broken pipe")
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self.values.get(key, b"").decode() == expected:
            self.set(key, desired)
        return self.values[key]


class World:
    """Watchdogs of several ranks under a manual clock, which poll, work and wait on command."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch, joined: int | None = None) -> None:
        self.now, self.store = 0.0, Memory()
        self.cpu_seconds, self.is_waiting = 0.0, False
        monkeypatch.setattr(megatron.ranks.watchdog, "work_done", lambda: Work(self.now, self.cpu_seconds, 0))
        monkeypatch.setattr(megatron.ranks.watchdog, "is_in_collective", lambda: self.is_waiting)
        self.ranks = [Watchdog(rank, size, pytest.fail, clock=lambda: self.now) for rank in range(size)]
        for rank in self.ranks:
            rank.prepare(LIMIT, self.store)
        if joined is None:
            self.look(*range(size))

    def look(self, *ranks: int) -> list[str | None]:
        return [verdict.text if verdict else None for verdict in (self.ranks[rank].look() for rank in ranks)]

    def move(self, place: str, *ranks: int) -> None:
        for rank in ranks:
            self.ranks[rank].move(place)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.is_waiting = True
        yield
        self.is_waiting = False


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    return lambda size, **settings: World(size, monkeypatch, **settings)


WorldMaker = Callable[..., World]


def test_ranks_that_move_are_left_alone(make_world: WorldMaker) -> None:
    world = make_world(3)
    for step in range(20):
        world.now += 0.9 * PATIENT
        world.move(f"step {step}", 0, 1, 2)
        assert world.look(1, 2, 0, 1, 2) == [None] * 5


def test_a_rank_that_hangs_is_named_and_those_that_wait_for_it_are_not(make_world: WorldMaker) -> None:
    world = make_world(3)
    for rank, moves in enumerate((5, 3, 5)):
        for move in range(moves):
            world.move(f"iteration 1, forward layer 2 chunk {move}", rank)
    for world.now in (0.0, 0.9 * PATIENT):
        assert world.look(1, 2, 0) == [None] * 3
    world.now = 1.1 * PATIENT
    assert world.look(1, 2, 0, 1, 2) == [
        None,
        None,
        *["rank 1 (last in iteration 1, forward layer 2 chunk 2) has not moved for 1 minutes"] * 3,
    ]


def test_a_rank_that_is_gone_is_named_before_those_that_wait_for_it(make_world: WorldMaker) -> None:
    world = make_world(3)
    for rank in range(3):
        world.move(f"the place of {rank}", rank)
    world.look(2, 1, 0)
    for world.now in (0.6 * PATIENT, 1.1 * PATIENT):
        found = world.look(1, 0, 1)
    assert found == [None, *["rank 2 (last in the place of 2) no longer answers"] * 2]


def test_the_first_rank_is_missed_where_the_store_lives_on(make_world: WorldMaker) -> None:
    world = make_world(2)
    world.now = 1.1 * PATIENT
    assert world.look(1) == ["rank 0 (last in joining) no longer answers"]


def test_ranks_that_never_came_are_named(make_world: WorldMaker) -> None:
    world = make_world(4, joined=0)
    for world.now in (0.0, 0.9 * PATIENT):
        assert world.look(0, 2) == [None] * 2
    world.now = 1.1 * PATIENT
    assert world.look(0, 2) == ["rank(s) 1, 3 of 4 did not join within 1 minutes"] * 2


def test_a_rank_that_is_through_is_not_missed(make_world: WorldMaker) -> None:
    world = make_world(2)
    world.ranks[1].leave()
    world.now = 5 * PATIENT
    world.move("saving", 0)
    assert world.look(0) == [None]


def test_a_rank_that_works_may_take_as_long_as_it_likes_and_the_others_wait(make_world: WorldMaker) -> None:
    world = make_world(2)
    with world.ranks[0].working("building the data index"), world.ranks[1].working("building the data index"):
        for _ in range(10):
            world.now += 0.9 * PATIENT
            with world.waiting():
                assert world.look(1) == [None]
            world.cpu_seconds += 0.5 * PATIENT
            assert world.look(0) == [None]
        world.now += 1.1 * PATIENT
        with world.waiting():
            assert world.look(1) == [None]
        place = "rank 0 (last in building the data index)"
        assert world.look(0, 1) == [f"{place} has not moved for 1 minutes"] * 2


def test_a_wait_that_keeps_the_processor_busy_is_no_work(make_world: WorldMaker) -> None:
    world = make_world(2)
    with world.ranks[0].working("saving iteration 5"), world.ranks[1].working("saving iteration 5"):
        world.look(1, 0)
        for turn in range(1, 4):
            world.now += 0.5 * PATIENT
            with world.waiting():
                world.cpu_seconds = turn * PATIENT  # of rank 1 alone
                world.look(1)
            world.cpu_seconds = 0.0
            found = world.look(0)
        assert found == ["rank 0 (last in saving iteration 5) has not moved for 1 minutes"]


def test_work_of_one_rank_counts_as_no_progress_over_the_others(make_world: WorldMaker) -> None:
    world = make_world(2)
    with world.ranks[0].working("saving"):
        for _ in range(5):
            world.now, world.cpu_seconds = world.now + 1, world.cpu_seconds + 1
            world.look(0)
    world.move("saving", 1)
    world.move("iteration 9", 1, 1, 1)
    world.look(1, 0)
    world.now += 1.1 * PATIENT
    world.look(1)
    assert world.look(0) == ["rank 0 (last in saving) has not moved for 1 minutes"]


def test_a_silent_rank_is_gone_soon_after_something_else_went_wrong(make_world: WorldMaker) -> None:
    world = make_world(3)
    world.ranks[2].hurry()
    for world.now in (0.1 * PATIENT, 0.4 * PATIENT):
        world.move("iteration 3", 0, 2)
        found = world.look(2, 0)
    assert found == [None, "rank 1 (last in joining) no longer answers"]


def test_a_rank_that_failed_is_named_with_its_reason_and_exit_code(make_world: WorldMaker) -> None:
    world = make_world(2)
    own = Verdict("rank 1 (last in joining) stopped: a file is damaged", 2, speaker=1)
    assert world.ranks[1]._publish(own) == own
    assert world.ranks[0].look() == own
    assert world.ranks[1].look() is None
    assert world.ranks[0]._publish(Verdict("rank 1 is gone")) == own


def start(store: Memory, connect: Callable[[], Any] | None = None) -> tuple[Watchdog, list[str], threading.Event]:
    said: list[str] = []
    heard = threading.Event()

    def end(verdict: Verdict, watchdog: Watchdog) -> None:
        said.append(f"{verdict.text}; {watchdog.place}")
        heard.set()

    watchdog = Watchdog(0, 2, end)
    watchdog.start(0.3, connect or (lambda: store))
    return watchdog, said, heard


def test_the_thread_speaks_by_itself_and_says_where_it_was() -> None:
    watchdog, said, heard = start(Memory())
    watchdog.move("iteration 7, backward layer 1 chunk 0")
    assert heard.wait(30)
    assert said == ["rank(s) 1 of 2 did not join within 0.00375 minutes; iteration 7, backward layer 1 chunk 0"]
    watchdog.close()


def test_a_lost_store_is_reported() -> None:
    store = Memory()
    store.is_broken = True
    watchdog, said, heard = start(store)
    assert heard.wait(30)
    assert said[0].startswith("rank 0 (last in joining), or the launcher that started it, no longer answers (Broken")
    watchdog.close()


@pytest.mark.parametrize("hanging", ["connect", "check"])
def test_a_store_that_does_not_answer_is_reported(hanging: str) -> None:
    class Hanging(Memory):
        def check(self, keys: list[str]) -> bool:
            threading.Event().wait()
            return False

    _, said, heard = start(Hanging(), threading.Event().wait if hanging == "connect" else None)
    assert heard.wait(30)
    assert said[0].startswith("rank 0 (last in joining), or the launcher that started it, no longer answers;")


def test_only_one_of_the_ranks_that_fail_is_the_first() -> None:
    store = Memory()
    ranks = [Watchdog(rank, 2, pytest.fail) for rank in range(2)]
    for rank in ranks:
        rank.start(100.0, lambda: store)
    assert [rank.fail("was interrupted", 130) for rank in ranks] == [True, False]
    assert Watchdog().fail("was interrupted", 130)


def test_every_place_is_recorded() -> None:
    places: list[str] = []
    watchdog = Watchdog(record_place=places.append)
    watchdog.move("iteration 1")
    with watchdog.working("saving iteration 1"):
        pass
    assert places == ["joining", "iteration 1", "saving iteration 1"]


def test_work_is_processor_time_of_the_main_thread_and_bytes(tmp_path: Any) -> None:
    before = work_done()
    assert not Work(before.at + 1, before.cpu_seconds + 0.001, before.num_bytes + 100).is_well_past(before)
    (tmp_path / "file").write_bytes(bytes(2**20))
    assert work_done().is_well_past(Work(before.at, 1e9, before.num_bytes))
    sum(range(10**6))
    assert work_done().is_well_past(Work(before.at, before.cpu_seconds, 2**60))


def test_a_thread_inside_a_collective_is_seen_to_wait() -> None:
    assert not is_in_collective()
    source = "def barrier():\n    return is_in_collective()\n"
    scope: dict[str, Any] = {"is_in_collective": is_in_collective}
    exec(compile(source, "/site-packages/torch/distributed/distributed_c10d.py", "exec"), scope)
    assert scope["barrier"]()
