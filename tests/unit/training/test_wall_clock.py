"""What is due by time after a step."""

import pytest

from megatron.training.wall_clock import Due, WallClock
from tests.unit.config.commands import parsed


class Clock:
    """A clock that a test sets, in minutes."""

    minutes = 1000.0

    def __call__(self) -> float:
        return self.minutes * 60


def step(wall: WallClock, clock: Clock, minutes: float, stop: bool = False) -> Due:
    due = wall.start_step(stop)
    clock.minutes += minutes
    wall.finish_step()
    return due


def wall_clock(flags: str) -> tuple[WallClock, Clock]:
    clock = Clock()
    return WallClock(parsed(flags), clock), clock


def test_nothing_is_due_by_time_unless_a_flag_asks_for_it() -> None:
    wall, clock = wall_clock("--log-interval 10")
    assert {step(wall, clock, minutes=1e6) for _ in range(3)} == {Due()}
    assert step(wall, clock, 1, stop=True) == Due(stop=True)


def test_the_first_step_and_long_ones_get_a_line_unless_an_interval_is_given() -> None:
    wall, clock = wall_clock("")
    assert [step(wall, clock, seconds / 60).log for seconds in (1, 9, 11, 12, 1, 1)] == [
        *(True, False, False, True, True, False)
    ]


@pytest.mark.parametrize("kind", ["save", "evaluate"])
def test_an_interval_in_minutes_ends_with_the_step_in_which_it_is_up(kind: str) -> None:
    flag = "--save x --save-interval-mins 60" if kind == "save" else "--eval-interval-mins 60"
    wall, clock = wall_clock(flag)
    count = wall.count_checkpoint if kind == "save" else wall.count_evaluation
    due = []
    for _ in range(8):
        due.append(getattr(step(wall, clock, 25), kind))
        if due[-1]:
            clock.minutes += 7  # which counts neither for the step nor for the next interval
            count()
    assert due == [False, False, True, False, False, True, False, False]


def test_other_checkpoints_count_too() -> None:
    wall, clock = wall_clock("--save x --save-interval-mins 60")
    for _ in range(5):
        assert not step(wall, clock, 25).save
        wall.count_checkpoint()


def test_the_run_ends_when_its_time_is_over() -> None:
    wall, clock = wall_clock("--exit-duration-in-mins 50")
    assert [step(wall, clock, 25).stop for _ in range(3)] == [False, False, True]
