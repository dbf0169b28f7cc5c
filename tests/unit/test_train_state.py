"""The counters of a run: what a step adds, what a new sequence length resets, and that nothing is lost in JSON."""

import json

from megatron.train_state import TrainState


def test_a_step_counts_iterations_samples_and_tokens() -> None:
    state = TrainState()
    for _ in range(3):
        state.advance(samples=4, seq_length=64)
    assert (state.iteration, state.consumed_samples, state.consumed_tokens, state.data_samples) == (3, 12, 768, 12)


def test_the_first_sequence_length_is_no_change() -> None:
    state = TrainState()
    assert not state.start_data(64)
    assert state.seq_length == 64


def test_the_same_sequence_length_goes_on_in_the_data() -> None:
    state = TrainState(data_samples=12, seq_length=64)
    assert not state.start_data(64)
    assert state.data_samples == 12


def test_another_sequence_length_starts_the_data_again_and_keeps_the_totals() -> None:
    state = TrainState(iteration=3, consumed_samples=12, consumed_tokens=768, data_samples=12, seq_length=64)
    assert state.start_data(256)
    assert (state.data_samples, state.seq_length) == (0, 256)
    assert (state.iteration, state.consumed_samples, state.consumed_tokens) == (3, 12, 768)


def test_going_back_keeps_the_counters_of_the_checkpoint_and_the_place_in_the_data() -> None:
    saved = TrainState(3, 12, 768, 20, 64, left_out_samples=8, rollbacks=1)
    saved.leave_out_data_of(TrainState(6, 24, 1536, 32, 64, left_out_samples=8, rollbacks=2))
    assert saved == TrainState(3, 12, 768, 32, 64, left_out_samples=20, rollbacks=3)


def test_a_state_survives_the_way_through_json() -> None:
    state = TrainState(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert TrainState(**json.loads(json.dumps(state.to_dict()))) == state
