import math
from dataclasses import replace

import pytest

from megatron.config.errors import ConfigError
from megatron.config.optimizer import OptimizerConfig
from megatron.config.training import TrainingConfig
from megatron.core.course import Course
from megatron.optimizer.schedule import STYLES, WSD_STYLES, LearningRateSchedule, ScheduleError

LINEAR = LearningRateSchedule(peak=1.0, minimum=0.1, warmup=10, decay=110, style="linear", unit="iters")
WSD = replace(LINEAR, style="WSD", wsd_decay=20, wsd_style="linear")


def rate(schedule: LearningRateSchedule, iteration: int) -> float:
    return schedule.at(iteration, samples=0, tokens=0)


# Of the schedules that `build` makes: an iteration is so many.
STEP = {"iters": 1, "samples": 4, "tokens": 400}
STRAIGHT = Course.straight(global_batch_size=4, seq_length=100)
TURNING = Course(((0, 0, 0), (10, 40, 4000)), (1, 8, 1600))  # batch 8 and length 200 from iteration 10 on


def build(optimizer: OptimizerConfig, training: TrainingConfig, course: Course = STRAIGHT) -> LearningRateSchedule:
    return LearningRateSchedule.from_config(optimizer, training, course)


# Peak 1, minimum 0.1, and a final decay of 10 of 50 iterations: the rate of iteration i after a warm-up of w.
FORMULAS = {
    "constant": lambda i, w: 1.0,
    "linear": lambda i, w: 0.1 + 0.9 * (50 - i) / (50 - w),
    "cosine": lambda i, w: 0.1 + 0.9 * (1 + math.cos(math.pi * (i - w) / (50 - w))) / 2,
    "inverse-square-root": lambda i, w: max(0.1, math.sqrt(max(w, 1)) / math.sqrt(i)),
    "WSD": lambda i, w: 1.0 if i <= 40 else 0.1 + 0.9 * (2 * 0.5 ** ((i - 40) / 10) - 1),
}


@pytest.mark.parametrize("style", FORMULAS)
@pytest.mark.parametrize("unit", STEP)
@pytest.mark.parametrize(
    "warmup, length",
    [
        ({}, 0),
        ({"lr_warmup_samples": 1}, 0.25),
        ({"lr_warmup_iters": 1}, 1),
        ({"lr_warmup_iters": 5}, 5),
        ({"lr_warmup_samples": 20}, 5),
        ({"lr_warmup_tokens": 2000}, 5),
        ({"lr_warmup_fraction": 0.1}, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["train", "lr_decay"])
def test_every_rate_is_that_of_the_formula_whatever_the_unit(style, unit, warmup, length, given):
    wsd = {f"lr_wsd_decay_{unit}": 10 * STEP[unit]} if style == "WSD" else {}
    decay = {f"{given}_{unit}": 50 * STEP[unit]}
    training = decay if given == "train" else {"train_iters": 99}
    optimizer = {**warmup, **wsd, **(decay if given == "lr_decay" else {})}
    schedule = build(OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, **optimizer), TrainingConfig(**training))
    rates = [schedule.at(i, 4 * i, 400 * i) for i in range(1, 53)]
    expected = [i / length if i < length else FORMULAS[style](i, length) for i in range(1, 51)]
    end = 1.0 if style == "constant" else 0.1
    assert rates == pytest.approx([*expected, end, end], rel=1e-12)


@pytest.mark.parametrize("unit", STEP)
def test_inverse_square_root_without_warmup_begins_at_the_peak(unit):
    optimizer = OptimizerConfig(lr=1e-3, lr_decay_style="inverse-square-root")
    schedule = build(optimizer, TrainingConfig(**{f"train_{unit}": 64 * STEP[unit]}))
    rates = [schedule.at(i, 4 * i, 400 * i) for i in (1, 2, 4, 64, 65)]
    assert rates == pytest.approx([1e-3, 1e-3 / math.sqrt(2), 5e-4, 1.25e-4, 0])


@pytest.mark.parametrize("style", FORMULAS)
@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("warmup", [{"lr_warmup_iters": 5}, {"lr_warmup_iters": 20}], ids=["behind", "ahead"])
def test_a_change_of_batch_and_length_leaves_the_rates_before_it_as_they_were(style, unit, warmup):
    wsd = {"lr_wsd_decay_iters": 5} if style == "WSD" else {}
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, **warmup, **wsd)
    before, after = (
        build(optimizer, TrainingConfig(**{f"train_{unit}": 1000 * STEP[unit]}), course)
        for course in (STRAIGHT, TURNING)
    )
    if warmup == {"lr_warmup_iters": 5}:
        rates = [[each.at(i, 4 * i, 400 * i) for i in range(1, 11)] for each in (before, after)]
        assert rates[1] == pytest.approx(rates[0], rel=1e-12)
    else:  # which the change makes longer in samples and tokens
        assert after.warmup == {"samples": 40 + 10 * 8, "tokens": 4000 + 10 * 1600}[unit]
        assert after.at(20, 40 + 80, 4000 + 16000) == 1.0


def test_the_final_decay_is_counted_back_from_the_end_across_a_change():
    optimizer = OptimizerConfig(lr=1.0, lr_decay_style="WSD", lr_wsd_decay_iters=4)
    schedule = build(optimizer, TrainingConfig(train_samples=56), TURNING)  # iterations 8 to 12
    assert (schedule.decay, schedule.decay - schedule.wsd_decay) == (56, 32)


@pytest.mark.parametrize(
    "budgets, course, end",
    [
        ({"train_samples": 100, "train_tokens": 20_000}, STRAIGHT, (100, "samples")),
        ({"train_samples": 300, "train_tokens": 20_000}, STRAIGHT, (20_000, "tokens")),
        ({"train_samples": 100, "train_tokens": 12_000}, TURNING, (12_000, "tokens")),
        ({"train_iters": 11, "train_samples": 100, "train_tokens": 20_000}, TURNING, (11, "iters")),
    ],
)
def test_decay_ends_with_the_budget_that_is_spent_first(budgets, course, end):
    schedule = build(OptimizerConfig(lr=1.0), TrainingConfig(**budgets), course)
    assert (schedule.decay, schedule.unit) == end


def test_warmup_rises_in_a_line_from_its_initial_rate():
    schedule = replace(LINEAR, warmup_initial=0.2)
    assert [rate(schedule, i) for i in (0, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("constant", "WSD")])
def test_decay_starts_at_the_peak_falls_and_ends_at_the_minimum(style):
    rates = [rate(replace(LINEAR, style=style), i) for i in range(10, 112)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("style", STYLES)
def test_the_rate_stays_where_the_decay_ended(style):
    schedule = replace(LINEAR, style=style, wsd_decay=10)
    end = 1.0 if style == "constant" else 0.1
    assert [rate(schedule, i) for i in (111, 112, 10**9)] == pytest.approx([end] * 3)


@pytest.mark.parametrize(
    "style, expected",
    [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0), ("inverse-square-root", 60**-0.5 * 10**0.5)],
)
def test_half_way_rate_matches_the_formula(style, expected):
    assert rate(replace(LINEAR, style=style), 60) == pytest.approx(expected)


def test_cosine_at_a_quarter_matches_the_formula():
    assert rate(replace(LINEAR, style="cosine"), 35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_inverse_square_root_never_falls_below_the_minimum():
    assert rate(replace(LINEAR, style="inverse-square-root", decay=10**6), 9999) == 0.1


@pytest.mark.parametrize("style", [style for style in STYLES if style != "WSD"])
def test_without_warmup_the_first_step_is_near_the_peak(style):
    assert rate(replace(LINEAR, style=style, warmup=0), 0) == 1.0
    assert rate(replace(LINEAR, style=style, warmup=0), 1) == pytest.approx(1.0, rel=0.01)


def test_warmup_as_long_as_the_decay_reaches_the_peak_and_then_the_minimum():
    schedule = replace(LINEAR, warmup=10, decay=10)
    assert [rate(schedule, i) for i in (9, 10, 11)] == pytest.approx([0.9, 1.0, 0.1])


def test_wsd_is_flat_until_its_final_decay():
    assert [rate(WSD, i) for i in (10, 50, 90)] == [1.0, 1.0, 1.0]
    assert rate(WSD, 91) < 1.0


@pytest.mark.parametrize(
    "style, half_way",
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus_sqrt", 1 - 0.5**0.5)],
)
def test_wsd_styles_match_their_formulas(style, half_way):
    schedule = replace(WSD, wsd_style=style)
    assert rate(schedule, 100) == pytest.approx(0.1 + 0.9 * half_way)
    assert rate(schedule, 110) == pytest.approx(0.1)


def test_every_wsd_style_is_tested_above():
    assert set(WSD_STYLES) == {"linear", "cosine", "exponential", "minus_sqrt"}


@pytest.mark.parametrize("unit, counts", [("iters", (60, 0, 0)), ("samples", (0, 60, 0)), ("tokens", (0, 0, 60))])
def test_progress_is_counted_in_the_unit_of_the_schedule(unit, counts):
    assert replace(LINEAR, unit=unit).at(*counts) == pytest.approx(0.55)


def test_progress_may_be_a_fraction_of_an_iteration():
    assert replace(LINEAR, minimum=0.0, warmup=0.5, decay=1.0).at_progress(0.25) == 0.5


def test_from_config_decays_over_the_whole_training_by_default():
    schedule = build(OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10), TrainingConfig(train_iters=110))
    assert schedule == LINEAR


def test_from_config_converts_lengths_to_the_unit_of_the_decay():
    optimizer = OptimizerConfig(
        lr=1.0, lr_decay_style="WSD", lr_decay_tokens=40_000, lr_warmup_iters=10, lr_wsd_decay_samples=50
    )
    schedule = build(optimizer, TrainingConfig(train_iters=1000))
    assert (schedule.unit, schedule.warmup, schedule.decay, schedule.wsd_decay) == ("tokens", 4000, 40_000, 5000)


def test_from_config_takes_the_warmup_as_a_fraction_of_the_decay():
    optimizer = OptimizerConfig(lr=1.0, lr_warmup_fraction=0.1)
    assert build(optimizer, TrainingConfig(train_iters=110)).warmup == pytest.approx(11)


@pytest.mark.parametrize(
    "optimizer, training, message",
    [
        ({"lr_decay_iters": 5, "lr_decay_tokens": 9}, {"train_iters": 5}, r"--lr-decay-iters \(5\) and --lr-decay-tok"),
        ({"lr_warmup_iters": 5, "lr_warmup_samples": 9}, {"train_iters": 50}, r"--lr-warmup-iters .*only one"),
        ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, {"train_iters": 50}, r"--lr-warmup-fraction \(0.1\) and a"),
        ({"lr_warmup_fraction": 10.0}, {"train_iters": 50}, r"--lr-warmup-fraction \(10\) must lie between 0 and 1"),
        ({"lr_warmup_iters": 51}, {"train_iters": 50}, r"warm-up \(51 iters\) must not be longer .* \(50 iters\)"),
        ({}, {}, "at least one of --train-iters, --train-samples and --train-tokens"),
        ({"min_lr": 2.0}, {"train_iters": 50}, r"--min-lr \(2\) must lie between 0 and --lr \(1\)"),
        ({"lr_warmup_init": 2.0}, {"train_iters": 50}, r"--lr-warmup-init \(2\) must lie between"),
        ({"lr_decay_style": "WSD"}, {"train_iters": 50}, r"--lr-wsd-decay-iters \(0\) must lie between 1 and 50"),
        (
            {"lr_decay_style": "step"},
            {"train_iters": 50},
            r"--lr-decay-style \('step'\) is unknown; use one of constant",
        ),
    ],
)
def test_contradictions_are_named(optimizer, training, message):
    with pytest.raises(ScheduleError, match=message) as raised:
        build(OptimizerConfig(lr=1.0, **optimizer), TrainingConfig(**training))
    assert isinstance(raised.value, ConfigError)
