import pytest
import torch

from megatron.fpdt.random_state import RandomStates

CPU = torch.device("cpu")


def recorded_draws(states, num_chunks):
    draws = []
    for chunk in range(num_chunks):
        states.record(chunk)
        draws.append(torch.rand(5))
    return draws


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 0, 3]])
def test_each_chunk_replays_its_random_numbers_in_any_order(order):
    torch.manual_seed(1)
    states = RandomStates(CPU, enabled=True)
    draws = recorded_draws(states, 4)
    for chunk in order:
        with states.replay(chunk):
            assert torch.equal(torch.rand(5), draws[chunk])


def test_one_replay_can_continue_with_another():
    states = RandomStates(CPU, enabled=True)
    draws = recorded_draws(states, 3)
    with states.replay(2):
        states.continue_with(0)
        assert torch.equal(torch.rand(5), draws[0])


def test_the_generator_is_restored():
    states = RandomStates(CPU, enabled=True)
    recorded_draws(states, 2)
    found = torch.get_rng_state()
    with states.replay(0):
        torch.rand(100)
    assert torch.equal(torch.get_rng_state(), found)


def draw_and_fail(states):
    with states.replay(1):
        torch.rand(100)
        raise ValueError("in the middle")


def test_the_generator_is_restored_if_the_work_fails():
    states = RandomStates(CPU, enabled=True)
    recorded_draws(states, 2)
    found = torch.get_rng_state()
    with pytest.raises(ValueError, match="in the middle"):
        draw_and_fail(states)
    assert torch.equal(torch.get_rng_state(), found)


def test_recording_draws_nothing():
    found = torch.get_rng_state()
    RandomStates(CPU, enabled=True).record(0)
    assert torch.equal(torch.get_rng_state(), found)


def test_disabled_states_neither_record_nor_replay():
    states = RandomStates(CPU, enabled=False)
    recorded_draws(states, 1)
    found = torch.get_rng_state()
    with states.replay(7):
        torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), found)
