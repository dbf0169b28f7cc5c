"""Intervals that do not suit the planned step time."""

import pytest

from megatron.config import Config
from megatron.launch.execution import plan_of
from megatron.launch.intervals import duration, interval_warnings
from megatron.planner.hardware import GIB, GPUS
from megatron.planner.training import Training
from megatron.training.lengths import phases_of_run
from tests.unit.launch.test_execution import VOCABULARY, config_of

TWO_MILLION = ["--seq-length", "2M", "--ds-sequence-parallel-fpdt-chunk-size", "64K", "--train-iters", "1000"]
SAVES = ["--save", "x", "--save-interval", "10"]
NO_EVALUATION = ["--eval-iters", "0"]


def warnings(*flags: str) -> list[str]:
    config: Config = config_of(*TWO_MILLION, *flags)
    plan = plan_of(config, 4, GPUS["H100"], 400 * GIB, VOCABULARY)
    return interval_warnings(config, plan, Training.of(plan, {}, phases_of_run(config, 4)))


def test_intervals_that_suit_the_step_time_have_no_warning() -> None:
    assert warnings(*SAVES, *NO_EVALUATION) == []
    assert warnings("--save", "x", "--save-interval-mins", "60", "--eval-iters", "1") == []
    assert warnings(*NO_EVALUATION, "--train-iters", "10", "--save", "x") == []


def test_an_evaluation_of_hours_names_its_time_and_fewer_batches() -> None:
    (line,) = warnings(*SAVES)
    assert line.startswith("by the plan an evaluation of --eval-iters (100) takes 12.")
    assert " hours, after every 19." in line
    assert line.endswith(" days of training; use for example --eval-iters 1")


def test_an_evaluation_longer_than_the_training_between_is_named() -> None:
    (line,) = warnings(*SAVES, "--eval-iters", "1", "--eval-interval-mins", "5")
    assert line.endswith(" minutes, after every 5 minutes of training; lengthen the interval")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "by the plan the 1000 iterations take 19."),
        ([], " days, and nothing is saved; add --save FOLDER --save-interval-mins 60"),
        (["--train-tokens", "1e9"], "by the plan the 476 iterations take 9."),
        (["--save", "x"], "by the plan nothing is saved for 19."),
        (["--save", "x", "--save-interval", "200"], "by the plan nothing is saved for 3.9"),
        (["--save", "x", "--save-interval", "200"], " days; add for example --save-interval-mins 60"),
    ],
)
def test_days_without_a_checkpoint_are_named(flags: list[str], words: str) -> None:
    (line,) = warnings(*NO_EVALUATION, *flags)
    assert words in line


def test_a_duration_has_the_unit_that_a_person_would_use() -> None:
    assert [duration(seconds) for seconds in (300, 7000, 7200, 172800)] == [
        "5 minutes",
        "117 minutes",
        "2 hours",
        "2 days",
    ]
