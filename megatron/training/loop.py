"""The training loop: optimizer steps, log lines, evaluations, checkpoints, and the reasons to stop or to go back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from enum import Enum, auto
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.checkpointing import Saver
from megatron.checkpointing.train_state import TrainState
from megatron.data.batch import Batch
from megatron.initialize import GIB
from megatron.monitoring.finite_check import HOW_TO_RESUME, NotFiniteError, faulty_weights
from megatron.monitoring.profiling import StepProfiler
from megatron.optimizer.schedule import LearningRateSchedule
from megatron.training.data import TrainingData
from megatron.training.evaluation import evaluate
from megatron.training.lengths import Lengths
from megatron.training.rollback import Rollback
from megatron.training.run import Run
from megatron.training.step import OptimizerStep, StepTotals, describe_next_step
from megatron.training.stop_signal import StopSignal
from megatron.training.wall_clock import Due, WallClock


class Outcome(Enum):
    """What follows a step, on all ranks alike."""

    CONTINUE = auto()
    EXIT = auto()
    ROLL_BACK = auto()


class Training:
    """The training loop of one run, with its state."""

    def __init__(self, run: Run, data: TrainingData, saver: Saver, state: TrainState) -> None:
        self._run, self._data, self._saver, self.state = run, data, saver, state
        self._config, self._context, self._engine = run.config, run.context, run.engine
        self._profiler = StepProfiler(run.config.logging, run.context)
        self._rollback = Rollback(run.config, run.engine, run.context, run.losses)
        self._optimizer_step = OptimizerStep(run, self._rollback, self._profiler)
        self._stop_signal = StopSignal()
        self._clock = WallClock(run.config, time.monotonic)
        self._saved_iteration = state.iteration
        self._plan_steps()

    def run(self) -> None:
        """Train to the end or to a reason to stop; at the end, save and evaluate on the test part."""
        with closing(self._profiler):
            while (outcome := self._train()) is Outcome.ROLL_BACK:
                self._go_back()
        if outcome is Outcome.EXIT:
            return
        self._save()
        self._export()
        if self._config.training.eval_iters:
            evaluate(self._run, self._data, "test", self.state.iteration)

    def _plan_steps(self) -> None:
        """Plan the steps left, their data and their learning rates from the counts of the run so far."""
        config = self._config
        self._lengths = Lengths.of(config, self._context.parallel_state.world_size, self.state)
        self._schedule = LearningRateSchedule.from_config(config.optimizer, config.training, self._lengths.course)
        num_samples, *_ = self._lengths.num_samples(config, self.state)
        self._data.extend_training(num_samples)

    def _go_back(self) -> None:
        """Return to the last checkpoint, and skip the data since."""
        with self._context.watchdog.working(f"going back from iteration {self.state.iteration}"):
            self.state = self._rollback.go_back(self.state)
        self._saved_iteration = self.state.iteration
        self._plan_steps()

    def _train(self) -> Outcome:
        """Take the steps left, on the data that follow the samples read so far.

        Return whether a reason to exit or to roll back came before the last.
        """
        num_steps = self._lengths.iterations - self.state.iteration
        if num_steps <= 0:
            self._context.log.info("nothing to train: %s", self._lengths.left(self.state))
        with self._data.read("train", self.state.data_samples, num_steps) as batches:
            self._run.reporter.continue_from(self.state.iteration)
            while self.state.iteration < self._lengths.iterations:
                outcome, due = self._step(batches)
                if outcome is not Outcome.ROLL_BACK:
                    outcome = self._after_step(outcome, due)
                if outcome is not Outcome.CONTINUE:
                    return outcome
        return Outcome.CONTINUE

    def _step(self, batches: Iterator[Batch]) -> tuple[Outcome, Due]:
        """Take one optimizer step, count it and log it; return what follows. Collective over all ranks."""
        state, run = self.state, self._run
        microbatches = list(islice(batches, self._lengths.num_microbatches))
        self._enter_phase()
        due = self._clock.start_step(stop=self._stop_signal.received)
        totals = StepTotals.over_ranks(microbatches, due, run)
        rate = self._learning_rate(totals.seq_length)
        if totals.has_tokens:
            loss = self._optimizer_step.take(microbatches, totals, rate, state)
            self._count_step(totals.seq_length)
            run.losses.add(state.iteration, loss)
            if self._rollback.judge(state.iteration):
                return Outcome.ROLL_BACK, totals.due
            run.reporter.count_step(totals.seq_length, totals.attention_share)
            state.skipped_iterations += run.engine.step_was_skipped
        else:
            self._skip_step(totals.seq_length)
        is_interval = state.iteration % self._config.logging.line_interval == 0
        if is_interval or totals.due.log or state.iteration == self._lengths.iterations:
            scale, norm = run.engine.loss_scale, run.engine.gradient_norm()
            model: Any = run.engine.module
            run.reporter.line(state, rate, self._lengths.iterations, scale, norm, model.take_report())
        self._clock.finish_step()
        return Outcome.EXIT if totals.due.stop else Outcome.CONTINUE, totals.due

    def _after_step(self, outcome: Outcome, due: Due) -> Outcome:
        """Evaluate and save where intervals or `due` say so; at an exit interval, exit. Collective over all ranks."""
        training, iteration = self._config.training, self.state.iteration
        if training.eval_iters and (due.evaluate or _ends_interval(iteration, training.evaluation_interval)):
            evaluate(self._run, self._data, "validation", iteration)
            self._clock.count_evaluation()
        if due.save or _ends_interval(iteration, self._config.checkpoint.save_interval):
            self._save()
            self._clock.count_checkpoint()
        if _ends_interval(iteration, training.exit_interval):
            outcome = Outcome.EXIT
        if outcome is Outcome.EXIT:
            self._save()
            self._context.log.info("exiting at iteration %d", iteration)
        return outcome

    def _enter_phase(self) -> None:
        """Begin the phase of the next step, if it is another one."""
        length = self._lengths.samples.at(self.state.data_samples)
        if length != self.state.seq_length:
            self._context.log.info("from iteration %d: sequences of %d tokens", self.state.iteration + 1, length)
            self.state.enter(length)

    def _skip_step(self, seq_length: int) -> None:
        """Count a step whose labels are all masked. It has no gradient: weights and moments must not change."""
        step = describe_next_step(self.state)
        self._context.log.warning("every label of %s is masked: no step is taken, the weights stay as they are", step)
        self._count_step(seq_length)
        self.state.skipped_iterations += 1

    def _count_step(self, seq_length: int) -> None:
        self.state.advance(self._lengths.global_batch_size, seq_length)

    def _learning_rate(self, seq_length: int) -> float:
        """Return the learning rate of the next step, which counts as taken."""
        state, samples = self.state, self._lengths.global_batch_size
        tokens = samples * seq_length
        return self._schedule.at(state.iteration + 1, state.consumed_samples + samples, state.consumed_tokens + tokens)

    def _save(self) -> None:
        """Save a checkpoint, where a folder is given and this iteration is not saved already."""
        if self._config.checkpoint.save is None or self._saved_iteration == self.state.iteration:
            return
        started = time.monotonic()
        self._check_weights()
        with self._run.reporter.pause(), self._context.watchdog.working(f"saving iteration {self.state.iteration}"):
            path = self._saver.save(Path(self._config.checkpoint.save), self.state)
        self._saved_iteration = self.state.iteration
        gib, seconds = self._saver.size_bytes / GIB, time.monotonic() - started
        self._context.log.info("saved %s (%.3g GiB in %.1f s)", path, gib, seconds)

    def _export(self) -> None:
        """Write the folder of --save-hf, where it is given."""
        folder = self._config.checkpoint.save_hf
        if folder is None:
            return
        self._check_weights()
        with self._run.reporter.pause(), self._context.watchdog.working(f"writing {folder}"):
            self._saver.export(Path(folder))
        adapters = self._config.adapters
        what = "an adapter" if adapters.is_used and not adapters.merge_adapter else "a Hugging Face model"
        self._context.log.info("saved %s, %s", folder, what)

    def _check_weights(self) -> None:
        """Raise NotFiniteError where the weights of any rank are not finite. Collective over all ranks."""
        fault = faulty_weights(self._engine.weights_not_finite())
        if fault is not None:
            raise NotFiniteError(f"iteration {self.state.iteration} is not saved: {fault}; {HOW_TO_RESUME}.")


def _ends_interval(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
