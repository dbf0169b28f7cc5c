"""What the reporter says of iterations, held together with evaluations that fall between its lines."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from megatron.checkpointing.train_state import TrainState
from megatron.core.head_layout import HeadLayout
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.store import ChunkStore
from megatron.fpdt.stream import Stream
from megatron.logging.log_line import Bucket, parse_line
from megatron.monitoring import reporting
from megatron.monitoring.loss_window import LossWindow
from megatron.monitoring.reporting import Reporter
from megatron.ops.attention.reference import ReferenceAttention
from megatron.planner.flops import model_flops
from tests.unit.config.commands import parsed


class Writer:
    def __init__(self):
        self.written = {}

    def discard_after(self, step):
        self.written = {each: metrics for each, metrics in self.written.items() if each <= step}

    def write(self, step, metrics):
        self.written.setdefault(step, {}).update(metrics)


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(reporting, "time", clock)
    return clock


def reporter_of(flags=""):
    device = torch.device("cpu")
    context = SimpleNamespace(
        device=device, log=logging.getLogger("reporting test"), parallel_state=SimpleNamespace(world_size=1)
    )
    stream = Stream(ChunkStore(device, offloading=True), ReferenceAttention(), ParallelState(), HeadLayout(1, 1), 8)
    stream.store.kept = stream.store.empty((2**28,), torch.float32)  # type: ignore[attr-defined]
    writer, config = Writer(), parsed(flags)
    losses = LossWindow(config.logging.loss_spike_factor)
    return Reporter(config, context, writer, 128, stream, losses), writer


def line(reporter, state):
    reporter.line(state, learning_rate=1e-4, train_iterations=10, loss_scale=1.0, grad_norm=1.0)


def iterate(reporter, state, losses):
    for loss in losses:
        state.advance(2, 1024)
        reporter._losses.add(state.iteration, torch.tensor(loss))
        reporter.count_step(64, 1.0)


def test_losses_before_an_evaluation_count_and_its_time_does_not(clock, caplog):
    (reporter, writer), state = reporter_of(), TrainState()
    iterate(reporter, state, [4.0, math.nan])
    clock.now += 6
    with reporter.pause():
        clock.now += 1000
    iterate(reporter, state, [2.0])
    clock.now += 3
    line(reporter, state)
    assert caplog.messages == ["the loss of iteration 2 is nan"]
    assert state.nan_iterations == 1
    written = writer.written[3]
    assert written["train/loss"] == 3.0
    assert written["train/milliseconds"] == 3000
    assert written["train/nan_iterations"] == 1
    assert written["train/consumed_tokens"] == 3 * 2 * 1024
    assert written["train/host_pool_gib"] == 1.0


def test_the_time_left_counts_evaluations_and_not_the_first_steps(clock, caplog):
    caplog.set_level(logging.INFO)
    (reporter, _), state = reporter_of(), TrainState()
    for seconds in (3600, 100, 100):
        iterate(reporter, state, [4.0])
        clock.now += seconds
        line(reporter, state)
        with reporter.pause():
            clock.now += 80
    records = [parse_line(message) for message in caplog.messages]
    assert [round(record.hours_left * 3600) for record in records] == [9 * 3600, 8 * 180, 7 * 180]


def test_further_scalars_are_written_once_on_the_first_rank(clock):
    (reporter, writer), state = reporter_of(), TrainState()
    reporter._context.is_first_rank = True
    reporter.add_once(lambda: {"memory/gpu/weights": 2.0})
    for _ in range(2):
        iterate(reporter, state, [4.0])
        clock.now += 1
        line(reporter, state)
    assert [step for step, scalars in writer.written.items() if "memory/gpu/weights" in scalars] == [1]


def test_a_spike_is_warned_of_with_its_own_iteration(clock, caplog):
    (reporter, _), state = reporter_of("--loss-spike-factor 1.5"), TrainState(iteration=40)
    iterate(reporter, state, [2.0] * 11)
    clock.now += 1
    line(reporter, state)
    iterate(reporter, state, [2.0, 3.5, 2.0])
    clock.now += 1
    line(reporter, state)
    assert caplog.messages == ["the loss of iteration 53 is 3.5000, 1.75 times the mean of the 12 before (2.0000)"]


def test_lines_after_a_rollback_count_every_loss_once_and_time_only_the_steps_since(clock):
    (reporter, writer), state = reporter_of("--log-interval 4"), TrainState()
    iterate(reporter, state, [1.0, 2.0, 3.0, math.nan])
    clock.now += 8
    line(reporter, state)
    assert (writer.written[4]["train/loss"], state.nan_iterations) == (2.0, 1)
    iterate(reporter, state, [9.0])
    reporter._losses.forget_after(2)
    reporter.continue_from(2)
    assert max(writer.written, default=0) <= 2
    state = TrainState(iteration=2)
    iterate(reporter, state, [5.0, 6.0])
    clock.now += 3
    line(reporter, state)
    assert (writer.written[4]["train/loss"], state.nan_iterations) == (3.5, 0)
    assert writer.written[4]["train/milliseconds"] == 1500


def test_a_line_without_an_interval_averages_the_losses_since_the_last_line(clock):
    (reporter, writer), state = reporter_of(), TrainState()
    for losses, mean in (([1.0], 1.0), ([2.0, 4.0], 3.0), ([5.0], 5.0)):
        iterate(reporter, state, losses)
        clock.now += 1
        line(reporter, state)
        assert writer.written[state.iteration]["train/loss"] == mean
    reporter._losses.forget_after(3)
    reporter.continue_from(3)
    state = TrainState(iteration=3)
    iterate(reporter, state, [7.0])
    clock.now += 1
    line(reporter, state)
    assert writer.written[4]["train/loss"] == 7.0


def test_steps_without_a_loss_leave_the_others_and_their_iterations(clock, caplog):
    (reporter, writer), state = reporter_of(), TrainState()
    state.advance(2, 1024)
    clock.now += 1
    line(reporter, state)
    assert writer.written == {}
    iterate(reporter, state, [math.inf, 2.0])
    state.advance(2, 1024)
    clock.now += 1
    line(reporter, state)
    assert caplog.messages == ["the loss of iteration 2 is inf"]
    assert writer.written[4]["train/loss"] == 2.0


def test_throughput_counts_each_step_at_its_own_length(clock):
    (reporter, writer), state = reporter_of("--group-by-length"), TrainState(global_batch_size=2)
    flops = 0
    for length, share in ((64, 1.0), (1024, 0.5), (64, 1.0), (256, 1.0)):
        state.advance(2, length)
        reporter._losses.add(state.iteration, torch.tensor(1.0))
        reporter.count_step(length, share)
        flops += 2 * model_flops(parsed().model, 128, length, share)
    clock.now += 7
    line(reporter, state)
    written = writer.written[4]
    assert written["train/tokens_per_second_per_gpu"] == pytest.approx(2 * (64 + 1024 + 64 + 256) / 7)
    assert written["train/model_tflops_per_gpu"] == pytest.approx(flops / 7 / 1e12)
    assert written["train/seq_length"] == 256


def test_an_evaluation_writes_its_buckets(clock, caplog):
    caplog.set_level(logging.INFO)
    reporter, writer = reporter_of()
    reporter.evaluation(7, 2.0, "validation", [Bucket(0, 512, 3.0), Bucket(512, 1024, 1.0)])
    reporter.evaluation(8, 2.0, "validation")
    assert writer.written[7]["validation/loss"] == 2.0
    assert writer.written[7]["validation/loss_by_position/00000512-00001024"] == 1.0
    assert set(writer.written[8]) == {"validation/loss", "validation/perplexity"}
    assert [message.split("|")[0] for message in caplog.messages] == [
        " validation loss at iteration 7 ",
        " validation loss by position at iteration 7 ",
        " validation loss at iteration 8 ",
    ]
