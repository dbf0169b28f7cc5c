"""What a run's budgets leave of it, also after a change of batch or length, and the data that this takes."""

import pytest

from megatron.arguments import parse_args
from megatron.checkpointing.train_state import TrainState
from megatron.config import SampleLengths, sample_lengths
from megatron.training.lengths import Lengths
from tests.unit.config.commands import GPT

ROLLBACKS = "--rollback-on-loss-spike 3 --save x --save-interval 2 --loss-spike-factor 2"


def consumed(left_out: int = 0, rollbacks: int = 0) -> TrainState:
    """The counters after five steps of four samples of 1024 tokens."""
    state = TrainState()
    state.start(SampleLengths(((0, 1024),), 4))
    for _ in range(5):
        state.advance(4, 1024)
    state.left_out_samples, state.rollbacks = left_out, rollbacks
    state.data_samples += left_out
    return state


def plan(flags: str, state: TrainState) -> tuple[Lengths, tuple[int, int, int]]:
    config = parse_args([*GPT, *flags.split()])
    state.start(sample_lengths(config, 1))
    lengths = Lengths.of(config, 1, state)
    return lengths, lengths.num_samples(config, state)


@pytest.mark.parametrize(
    "flags, state, iterations, training_samples",
    [
        # from the start
        ("--train-iters 10 --global-batch-size 4", TrainState(), 10, 40),
        ("--train-samples 43 --global-batch-size 4", TrainState(), 10, 40),
        ("--train-tokens 45055 --global-batch-size 4", TrainState(), 10, 40),
        # resumed as it was
        ("--train-iters 10 --global-batch-size 4", consumed(), 10, 40),
        ("--train-samples 43 --global-batch-size 4", consumed(), 10, 40),
        ("--train-tokens 45055 --global-batch-size 4", consumed(), 10, 40),
        # with another batch: iterations stay iterations, and samples samples
        ("--train-iters 10 --global-batch-size 1", consumed(), 10, 25),
        ("--train-iters 10 --global-batch-size 8", consumed(), 10, 60),
        ("--train-samples 43 --global-batch-size 2", consumed(), 16, 42),
        ("--train-samples 43 --global-batch-size 8", consumed(), 7, 36),
        ("--train-samples 43 --global-batch-size 16", consumed(), 6, 36),
        ("--train-samples 43 --global-batch-size 24", consumed(), 5, 20),
        # with another length, at which the data start again
        ("--train-tokens 45056 --global-batch-size 4 --seq-length 512", consumed(), 17, 48),
        ("--train-tokens 45056 --global-batch-size 4 --seq-length 4096", consumed(), 6, 4),
        ("--train-samples 44 --global-batch-size 4 --seq-length 4096", consumed(), 11, 24),
        ("--train-iters 10 --global-batch-size 4 --seq-length 512", consumed(), 10, 20),
        # spent, or more than that
        ("--train-iters 5 --global-batch-size 1", consumed(), 5, 20),
        ("--train-iters 3 --global-batch-size 4", consumed(), 5, 20),
        ("--train-samples 20 --global-batch-size 1", consumed(), 5, 20),
        ("--train-samples 12 --global-batch-size 1", consumed(), 5, 20),
        ("--train-tokens 20480 --global-batch-size 1", consumed(), 5, 20),
        # a finished run with a larger budget
        ("--train-samples 21 --global-batch-size 1", consumed(), 6, 21),
        # what rollbacks left out, and may yet leave out
        ("--train-iters 10 --global-batch-size 4", consumed(left_out=8), 10, 48),
        ("--train-samples 40 --global-batch-size 4", consumed(left_out=8), 10, 48),
        (f"--train-iters 10 --global-batch-size 4 {ROLLBACKS}", consumed(), 10, 64),
        (f"--train-iters 10 --global-batch-size 2 {ROLLBACKS}", consumed(left_out=8, rollbacks=1), 10, 46),
    ],
)
def test_what_was_consumed_counts_and_the_rest_is_planned_from_it(
    flags: str, state: TrainState, iterations: int, training_samples: int
) -> None:
    lengths, num_samples = plan(f"{flags} --eval-iters 2", state)
    batch = lengths.global_batch_size
    assert lengths.iterations == iterations
    assert num_samples == (training_samples, 2 * batch, 2 * batch)


@pytest.mark.parametrize(
    "budgets, iterations, ends_by",
    [
        ("--train-samples 40 --train-tokens 30000", 7, "--train-tokens (30000)"),
        ("--train-samples 20 --train-tokens 300000000000", 5, "--train-samples (20)"),
        ("--train-iters 4 --train-samples 20", 4, "--train-iters (4)"),
        ("--train-iters 400 --train-samples 40 --train-tokens 1e9", 10, "--train-samples (40)"),
    ],
)
def test_of_several_budgets_the_one_spent_first_ends_the_run(budgets: str, iterations: int, ends_by: str) -> None:
    lengths, _ = plan(f"{budgets} --global-batch-size 4", TrainState())
    assert (lengths.iterations, lengths.ends_by) == (iterations, ends_by)


def test_which_budget_is_spent_first_can_change_with_the_length() -> None:
    budgets = "--train-samples 40 --train-tokens 100000 --global-batch-size 4"
    lengths, _ = plan(budgets, consumed())
    assert (lengths.iterations, lengths.ends_by) == (10, "--train-samples (40)")
    lengths, _ = plan(f"{budgets} --seq-length 8192", consumed())
    assert (lengths.iterations, lengths.ends_by) == (7, "--train-tokens (100000)")


def test_what_is_left_is_said_in_one_line() -> None:
    lengths, _ = plan("--train-samples 23 --global-batch-size 4", state := consumed())
    assert lengths.left(state) == (
        "--train-samples (23) leaves 0 iterations of 4 samples; consumed so far: 5 iterations, 20 samples, 20480 tokens"
    )
    lengths, _ = plan("--train-iters 1 --global-batch-size 4", state := TrainState())
    assert lengths.left(state) == "--train-iters (1) leaves 1 iteration of 4 samples"


@pytest.mark.parametrize(
    "budget, iterations",
    [
        ("--train-iters 10", 10),
        ("--train-samples 43", 10),
        ("--train-tokens 2047", 5),  # 3 steps of 4 x 64 tokens, then 2 of 4 x 128, then of 4 x 1024
        ("--train-tokens 767", 2),
        ("--train-tokens 768", 3),
        ("--train-tokens 1279", 3),
        ("--train-tokens 1280", 4),
        ("--train-tokens 10000", 7),
    ],
)
def test_budgets_of_a_schedule(budget: str, iterations: int) -> None:
    flags = f"{budget} --global-batch-size 4 --seq-length-schedule 64:3,128:2,1K"
    lengths, _ = plan(flags, TrainState())
    assert lengths.iterations == iterations
    assert lengths.unreached(TrainState()) == [length for first, length in ((3, 128), (5, 1024)) if first >= iterations]


def test_the_course_of_a_schedule_goes_on_from_any_of_its_steps() -> None:
    """So that a warm-up in tokens ends where it would have without the break."""
    flags = "--train-iters 20 --global-batch-size 4 --seq-length-schedule 64:3,128:2,1K"
    state = TrainState()
    courses = []
    for _ in range(8):
        lengths, _ = plan(flags, state)
        courses.append([lengths.course.convert(n, "iters", "tokens") for n in range(10)])
        state.enter(length := lengths.samples.at(state.data_samples))
        state.advance(4, length)
    expected = [0, 256, 512, 768, 1280, 1792, 5888, 9984, 14080, 18176]
    assert courses == [expected] * 8
