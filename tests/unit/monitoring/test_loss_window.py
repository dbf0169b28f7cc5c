import math

import pytest
import torch

from megatron.monitoring.loss_window import ENOUGH, SPIKE_WINDOW, LossWindow


def window_of(losses, factor=2.0, num_iterations=0):
    window = LossWindow(factor, num_iterations)
    for iteration, loss in enumerate(losses, 1):
        window.add(iteration, torch.tensor(loss))
    return window


def warnings(losses, factor=2.0):
    return window_of(losses, factor).take_warnings()


def test_a_spike_is_warned_of_with_its_iteration_and_the_mean_before_it():
    losses = [3.0] * ENOUGH + [6.1, 3.0]
    warning = "the loss of iteration 11 is 6.1000, 2.03 times the mean of the 10 before (3.0000)"
    assert warnings(losses) == [warning]
    assert [window_of(losses).warning(iteration) for iteration in (10, 11, 12)] == [None, warning, None]


def test_up_to_the_factor_and_without_one_nothing_is_a_spike():
    assert warnings([3.0] * ENOUGH + [6.0]) == []
    assert warnings([3.0] * ENOUGH + [600.0], factor=None) == []


def test_the_first_iterations_have_no_mean_to_exceed():
    assert warnings([1.0] * (ENOUGH - 1) + [9.0]) == []


def test_the_mean_runs():
    losses = [100.0] * SPIKE_WINDOW + [1.0] * SPIKE_WINDOW + [3.0]
    assert warnings(losses) == ["the loss of iteration 201 is 3.0000, 3.00 times the mean of the 100 before (1.0000)"]


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_warned_of_and_counts_in_no_mean(loss, factor):
    assert warnings([3.0] * ENOUGH + [loss, 6.0], factor) == [f"the loss of iteration 11 is {loss}"]


def test_a_warning_is_taken_once():
    window = window_of([math.nan])
    assert len(window.take_warnings()) == 1
    assert window.take_warnings() == []


def test_the_losses_after_an_iteration_are_returned_however_often_they_were_read():
    window = window_of([1.0, 2.0, 3.0])
    assert window.after(1) == [2.0, 3.0]
    window.add(5, torch.tensor(math.inf))  # every label of iteration 4 was masked
    assert window.after(1) == [2.0, 3.0, math.inf]
    assert window.after(5) == []


def test_the_window_holds_as_many_losses_as_it_is_asked_to():
    losses = [float(i) for i in range(1, 3 * SPIKE_WINDOW)]
    assert window_of(losses, num_iterations=200).after(0) == losses[-200:]


@pytest.mark.parametrize("read_before", [True, False])
def test_a_window_that_forgets_counts_repeated_iterations_once(read_before):
    window = window_of([1.0] * (ENOUGH + 1) + [9.0] * 9)
    if read_before:
        window.after(0)
    window.forget_after(ENOUGH + 1)
    assert window.after(0) == [1.0] * (ENOUGH + 1)
    assert window.take_warnings() == []
    window.add(ENOUGH + 2, torch.tensor(3.0))
    assert "3.00 times the mean of the 11 before (1.0000)" in (window.warning(ENOUGH + 2) or "")
    assert window.after(ENOUGH) == [1.0, 3.0]
