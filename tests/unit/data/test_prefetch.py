"""Prefetching: items in order, no more than the depth ahead, errors in place, and no thread left behind."""

import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest

from megatron.data import prefetch
from megatron.data.prefetch import Prefetcher

DEPTHS = [0, 1, 2, 7]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", DEPTHS)
def test_items_come_in_order_and_the_end_stays_the_end(depth: int) -> None:
    with Prefetcher(iter(range(100)), depth) as items:
        assert list(items) == list(range(100))
        assert list(items) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_are_ahead(depth: int) -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for k in range(100):
            made.append(k)
            yield k

    with Prefetcher(make(), depth) as items:
        for taken in range(5):
            wait_until(lambda taken=taken: len(made) == taken + depth)
            time.sleep(0.01)
            assert len(made) == taken + depth
            assert next(items) == taken


def test_with_depth_0_items_are_made_on_demand_without_a_thread() -> None:
    made: list[int] = []
    with Prefetcher((made.append(k) or k for k in range(3)), 0) as items:
        assert prefetch_threads() == []
        assert made == []
        assert [next(items), next(items)] == made == [0, 1]


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_comes_after_the_items_before_it_with_its_type_message_and_traceback(depth: int) -> None:
    def fail_on(number: int) -> int:
        raise ValueError(f"item {number} is damaged")

    def make() -> Iterator[int]:
        yield from range(3)
        yield fail_on(3)

    with Prefetcher(make(), depth) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="item 3 is damaged") as caught:
            next(items)
    assert "fail_on" in {frame.name for frame in traceback.extract_tb(caught.tb)}
    assert prefetch_threads() == []


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_early_ends_the_thread_of_an_endless_iterator(taken: int) -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 1

    with Prefetcher(forever(), 2) as items:
        for _ in range(taken):
            next(items)
    assert prefetch_threads() == []
    assert list(items) == []


def test_leaving_by_an_exception_ends_the_thread() -> None:
    with pytest.raises(RuntimeError, match="of the step"), Prefetcher(iter(range(100)), 2):
        raise RuntimeError("of the step")
    assert prefetch_threads() == []


def test_an_item_that_never_comes_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LONGEST_WAIT_SECONDS", 0.05)
    release = threading.Event()

    def stuck() -> Iterator[int]:
        release.wait()
        yield 1

    started = time.monotonic()
    with Prefetcher(stuck(), 1):
        pass
    assert time.monotonic() - started < 5
    release.set()
    wait_until(lambda: not prefetch_threads())


ENDINGS = {
    "without closing": ("", 0),
    "by an uncaught exception": ("raise RuntimeError('of the step')", 1),
    "by SIGTERM while it waits": ("import os, signal; os.kill(os.getpid(), signal.SIGTERM); next(items)", 7),
}


@pytest.mark.parametrize("ending, code", ENDINGS.values(), ids=ENDINGS)
def test_a_process_ends_though_an_item_never_comes(ending: str, code: int) -> None:
    program = f"""
import signal, sys, threading
from megatron.data.prefetch import Prefetcher
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
items = Prefetcher(iter(threading.Event().wait, True), 2)
{ending}
"""
    result = subprocess.run([sys.executable, "-c", program], timeout=30, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
