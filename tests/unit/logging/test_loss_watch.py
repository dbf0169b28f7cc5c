import math

import pytest

from megatron.logging.loss_watch import ENOUGH, WINDOW, LossWatch


def told(losses, factor=2.0):
    watch = LossWatch(factor)
    return {i: message for i, loss in enumerate(losses, 1) if (message := watch.look(i, loss)) is not None}


def test_a_spike_is_told_with_its_iteration_and_what_it_is_held_against():
    messages = told([3.0] * ENOUGH + [6.1, 3.0])
    assert messages == {11: "the loss of iteration 11 is 6.1000, 2.03 times the mean of the 10 before (3.0000)"}


def test_up_to_the_factor_and_without_one_nothing_is_a_spike():
    assert told([3.0] * ENOUGH + [6.0]) == {}
    assert told([3.0] * ENOUGH + [600.0], factor=None) == {}


def test_the_first_iterations_are_held_against_nothing():
    assert told([1.0] * (ENOUGH - 1) + [9.0]) == {}


def test_the_mean_runs():
    assert told([100.0] * WINDOW + [1.0] * WINDOW + [3.0]) == {
        2 * WINDOW + 1: "the loss of iteration 201 is 3.0000, 3.00 times the mean of the 100 before (1.0000)"
    }


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_told_and_counts_in_no_mean(loss, factor):
    messages = told([3.0] * ENOUGH + [loss, 6.0], factor)
    assert messages == {11: f"the loss of iteration 11 is {loss}"}


def test_losses_that_are_taken_back_are_held_against_nothing():
    watch = LossWatch(2.0)
    for iteration in range(1, 21):
        watch.look(iteration, 1.0 if iteration <= ENOUGH + 1 else 9.0)
    watch.forget_after(ENOUGH + 1)
    assert "3.00 times the mean of the 11 before (1.0000)" in (watch.look(ENOUGH + 2, 3.0) or "")
