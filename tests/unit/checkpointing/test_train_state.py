"""The counters of a run: what a step adds, what a new batch or length changes, and that nothing is lost in JSON."""

import json
from dataclasses import replace

import pytest

from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.train_state import TrainState
from megatron.config import SampleLengths
from megatron.config.sample_lengths import Phase


def trained(batch: int, length: int) -> TrainState:
    """The counters after three steps."""
    state = TrainState()
    state.start(SampleLengths(((0, length),), batch))
    for _ in range(3):
        state.advance(batch, length)
    return state


def test_a_step_counts_iterations_samples_and_tokens() -> None:
    state = TrainState()
    for _ in range(3):
        state.advance(samples=4, seq_length=64)
    assert (state.iteration, state.consumed_samples, state.consumed_tokens, state.data_samples) == (3, 12, 768, 12)


def test_the_first_batch_and_length_are_no_change() -> None:
    state = TrainState()
    assert state.start(SampleLengths(((0, 64),), 4)) == []
    assert (state.global_batch_size, state.seq_length, state.changes) == (4, 64, [])


def test_the_same_batch_and_length_continue_in_the_data() -> None:
    state = trained(4, 64)
    assert state.start(SampleLengths(((0, 64),), 4)) == []
    assert (state.data_samples, state.changes) == (12, [])


def test_another_sequence_length_starts_the_data_again_and_keeps_the_totals() -> None:
    state = trained(4, 64)
    (said,) = state.start(SampleLengths(((0, 256),), 4))
    assert said.startswith("--seq-length (256) differs from the checkpoint's (64): the data start again")
    assert (state.data_samples, state.seq_length) == (0, 256)
    assert (state.iteration, state.consumed_samples, state.consumed_tokens) == (3, 12, 768)
    assert state.changes == [[3, 12, 768]]


def test_another_batch_continues_in_the_data_and_is_said() -> None:
    state = trained(4, 64)
    (said,) = state.start(SampleLengths(((0, 64),), 8))
    assert said.startswith("the global batch (8 sequences) differs from the checkpoint's (4)")
    assert "give --global-batch-size 4 to keep the old one" in said
    assert (state.data_samples, state.changes) == (12, [[3, 12, 768]])


def test_a_checkpoint_from_before_the_batch_was_counted_has_its_mean() -> None:
    written = {"iteration": 3, "consumed_samples": 12, "consumed_tokens": 768, "data_samples": 12, "seq_length": 64}
    assert TrainState(**written).start(SampleLengths(((0, 64),), 4)) == []
    state = TrainState(**written)
    (said,) = state.start(SampleLengths(((0, 64),), 2))
    assert "differs from the checkpoint's (4)" in said
    assert state.course.convert(8, "samples", "iters") == 2
    assert state.course.convert(14, "samples", "iters") == 4


def test_the_course_has_a_corner_at_every_change() -> None:
    state = trained(4, 64)
    for batch, length in ((8, 64), (8, 64), (8, 256)):
        state.start(SampleLengths(((0, length),), batch))
        state.advance(batch, length)
    # iterations 3, 5 and 6; samples 12, 28 and 36; tokens 768, 1792 and 3840
    course = state.course
    assert [course.convert(n, "iters", "samples") for n in (0, 2, 3, 4, 5, 6, 10)] == [0, 8, 12, 20, 28, 36, 68]
    assert [course.convert(n, "samples", "tokens") for n in (12, 28, 36, 37)] == [768, 1792, 3840, 4096]
    assert [course.convert(n, "tokens", "iters") for n in (256, 1280, 3840, 5888)] == [1, 4, 6, 7]
    assert course.convert(12.5, "tokens", "tokens") == 12.5


SCHEDULE = SampleLengths(((0, 64), (8, 128), (20, 256)), 4)


def scheduled(num_steps: int) -> TrainState:
    """The counters after steps of the schedule."""
    state = TrainState()
    state.start(SCHEDULE)
    for _ in range(num_steps):
        length = SCHEDULE.at(state.data_samples)
        state.enter(length)
        state.advance(4, length)
    return state


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_a_schedule_resumes_at_every_step_with_the_same_corners(num_steps: int) -> None:
    state, straight = scheduled(num_steps), scheduled(8)
    assert state.start(SCHEDULE) == []
    for _ in range(8 - num_steps):
        state.enter(length := SCHEDULE.at(state.data_samples))
        state.advance(4, length)
    assert state == straight
    assert state.changes == [[2, 8, 512], [5, 20, 2048]]


@pytest.mark.parametrize(
    "phases, position, said",
    [
        (((0, 64), (8, 128), (20, 512)), 12, ""),  # what is to come may change
        (((0, 64), (8, 128), (24, 256)), 12, "--seq-length-schedule differs from the checkpoint's up to here: the"),
        (((0, 64), (8, 256)), 12, "--seq-length-schedule differs from the checkpoint's up to here: the"),
        (((0, 256),), 0, "--seq-length-schedule differs from the checkpoint's: the data start again"),
        (((0, 64),), 0, "--seq-length (64) differs from the checkpoint's (256): the data start again"),
    ],
)
def test_another_schedule_is_said_where_it_changes_what_was_read(
    phases: tuple[Phase, ...], position: int, said: str
) -> None:
    state = scheduled(3)
    assert [line[: len(said)] for line in state.start(SampleLengths(phases, 4))] == ([said] if said else [])
    assert state.data_samples == position


def test_grouping_is_another_order_of_the_data() -> None:
    state = trained(4, 64)
    (said,) = state.start(SampleLengths(((0, 64),), 4, is_grouped=True))
    assert said == "--group-by-length differs from the checkpoint's: the data start again at their first sample"
    assert state.data_samples == 0


def test_another_batch_is_refused_where_the_lengths_follow_from_it() -> None:
    with pytest.raises(
        CheckpointError, match=r"the global batch \(8 sequences\) differs .* \(4\).*--global-batch-size 4,"
    ):
        scheduled(3).start(replace(SCHEDULE, global_batch_size=8))


def test_going_back_keeps_the_counters_of_the_checkpoint_and_the_place_in_the_data() -> None:
    saved = TrainState(3, 12, 768, 20, 64, left_out_samples=8, rollbacks=1)
    saved.leave_out_data_of(TrainState(6, 24, 1536, 32, 64, left_out_samples=8, rollbacks=2))
    assert saved == TrainState(3, 12, 768, 32, 64, left_out_samples=20, rollbacks=3)


def test_a_state_survives_the_way_through_json() -> None:
    state = TrainState(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, [[1, 2, 3]])
    assert TrainState(**json.loads(json.dumps(state.to_dict()))) == state
