"""Ranks that die or hang are named by the others. Time is a number here, and no thread runs but in the last tests."""

import threading
from typing import Any

import pytest

from megatron.watchdog import Watchdog

LIMIT = 60.0


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


class World:
    """Ranks that look when they are told to, at a time that is set."""

    def __init__(self, size: int) -> None:
        self.now, self.store = 0.0, Memory()
        self.ranks = [
            Watchdog(self.store, rank, size, LIMIT, pytest.fail, clock=lambda: self.now) for rank in range(size)
        ]

    def look(self, *ranks: int) -> list[str | None]:
        return [self.ranks[rank].look() for rank in ranks]


def test_ranks_that_move_are_left_alone() -> None:
    world = World(3)
    for step in range(20):
        world.now += 0.9 * LIMIT
        for rank in range(3):
            world.ranks[rank].move(f"step {step}")
            world.look(rank)
        assert world.look(0, 1, 2) == [None] * 3


def test_a_rank_that_hangs_is_named_and_those_that_wait_for_it_are_not() -> None:
    world = World(3)
    for rank, moves in enumerate((5, 3, 5)):
        for move in range(moves):
            world.ranks[rank].move(f"iteration 1, forward layer 2 chunk {move}")
    assert world.look(0, 1, 2, 0, 1, 2) == [None] * 6
    world.now = 0.9 * LIMIT
    assert world.look(0, 1, 2) == [None] * 3
    world.now = 1.1 * LIMIT
    verdicts = world.look(0, 1, 2)
    assert verdicts == ["rank 1 (last in iteration 1, forward layer 2 chunk 2) has not moved for 1 minutes"] * 3


def test_a_rank_that_is_gone_is_named_before_those_that_wait_for_it() -> None:
    world = World(3)
    for rank in range(3):
        world.ranks[rank].move(f"the place of {rank}")
    world.look(0, 1, 2, 0, 1, 2)
    world.look(0, 1)
    world.now = 0.6 * LIMIT
    world.look(0, 1)
    world.now = 1.1 * LIMIT
    assert world.look(0, 1) == ["rank 2 (last in the place of 2) no longer answers"] * 2


def test_a_rank_that_never_came_is_named() -> None:
    world = World(2)
    world.ranks[0].move("somewhere")
    world.look(0)
    world.now = 1.1 * LIMIT
    world.ranks[0].move("somewhere else")
    assert world.look(0) == ["rank 1 (last in the preparation of its first step) no longer answers"]


def test_a_rank_that_is_through_is_not_missed() -> None:
    world = World(2)
    world.ranks[1].start()
    world.ranks[1].close()
    world.now = 5 * LIMIT
    world.ranks[0].move("saving")
    assert world.look(0) == [None]


def test_a_rank_that_rests_may_take_as_long_as_it_likes() -> None:
    world = World(2)
    with world.ranks[1].resting("saving iteration 5"):
        for _ in range(10):
            world.now += 0.9 * LIMIT
            world.ranks[0].move("waiting")
            assert world.look(1, 0) == [None] * 2
    world.look(1, 0)
    world.now += 1.1 * LIMIT
    world.ranks[0].move("waiting")
    assert world.look(1, 0)[1] == "rank 1 (last in saving iteration 5) has not moved for 1 minutes"


def run_thread(store: Memory, **settings: Any) -> tuple[Watchdog, list[str], threading.Event]:
    said: list[str] = []
    heard = threading.Event()

    def give_up(text: str) -> None:
        said.append(text)
        heard.set()

    watchdog = Watchdog(store, 0, 2, 0.2, give_up, **settings)
    watchdog.start()
    return watchdog, said, heard


def test_the_thread_gives_up_by_itself_and_says_where_it_was() -> None:
    watchdog, said, heard = run_thread(Memory())
    watchdog.move("iteration 7, backward layer 1 chunk 0")
    assert heard.wait(30)
    assert said == [
        "rank 1 (last in the preparation of its first step) no longer answers; this rank was in iteration 7, backward "
        "layer 1 chunk 0"
    ]
    watchdog.close()


def test_a_store_that_is_gone_is_told_of() -> None:
    store = Memory()
    store.is_broken = True
    watchdog, said, heard = run_thread(store)
    assert heard.wait(30)
    assert said[0].startswith("rank 0, or the launcher that started it, no longer answers (Broken pipe)")
    watchdog.close()


def test_a_store_that_does_not_answer_is_told_of() -> None:
    class Hanging(Memory):
        def check(self, keys: list[str]) -> bool:
            threading.Event().wait()
            return False

    _, said, heard = run_thread(Hanging())
    assert heard.wait(30)
    assert said[0].startswith("rank 0, or the launcher that started it, no longer answers; this rank was in")
