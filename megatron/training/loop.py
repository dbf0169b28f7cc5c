"""The training loop: batches, optimizer steps, evaluation, log lines, checkpoints, and the reasons to stop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.checkpointing import Saver, check_checkpoint, choose_checkpoint, load_checkpoint, starting_state
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, deepspeed_config, default_batch_notes
from megatron.data.batch import Batch, BatchProvider, ModelInputs
from megatron.data.blended_dataset import SampleDataset
from megatron.data.prefetch import Prefetcher
from megatron.data.samplers import BatchSampler
from megatron.data.splits import parse_split
from megatron.engine.engine import Engine
from megatron.fpdt.observer import Observer, Observers
from megatron.fpdt.stream import Stream
from megatron.initialize import GIB, Context
from megatron.logging.progress import StepProgress, build_progress
from megatron.logging.writers import build_writer
from megatron.monitoring.finite_check import FiniteCheck, NotFiniteError, StepRecord, faulty_weights
from megatron.monitoring.loss_by_position import LossByPosition, TokenLosses, bucket_edges
from megatron.monitoring.out_of_memory import Ledger
from megatron.monitoring.profiling import StepProfiler
from megatron.monitoring.reporting import Reporter
from megatron.monitoring.step_progress import ProgressObserver
from megatron.optimizer.param_groups import parameter_groups
from megatron.optimizer.schedule import LearningRateSchedule
from megatron.ranks.watchdog import WatchedProgress
from megatron.training.lengths import Lengths
from megatron.training.rollback import Rollback
from megatron.training.stop_signal import StopSignal

ModelProvider = Callable[[Observer], nn.Module]
Datasets = tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]
DatasetsProvider = Callable[[tuple[int, int, int]], Datasets]

_CONTINUE, _EXIT, _ROLL_BACK = 0, 1, 2
_RESUME = "earlier checkpoints are intact, resume from one with --load and --ckpt-step, and a lower --lr or other data"


def pretrain(
    config: Config,
    context: Context,
    padded_vocab_size: int,
    leaf_modules: Sequence[type[nn.Module]],
    provide_model: ModelProvider,
    provide_batch: BatchProvider,
    provide_datasets: DatasetsProvider,
    ledger: Ledger,
) -> None:
    """Train from the newest checkpoint, or from scratch, to the end that the configuration sets.

    `ledger` gets the engine and the stream, whose memory it reports.
    """
    watchdog, world_size = context.watchdog, context.parallel_state.world_size
    for note in (*config.notes, *default_batch_notes(config, world_size)):
        context.log.info("note: %s", note)
    checkpoint = _checkpoint_to_load(config, context, padded_vocab_size)
    state = starting_state(checkpoint, config, context)
    datasets = _build_datasets(config, context, state, provide_datasets)
    progress = WatchedProgress(
        build_progress(
            config.logging.progress, context.parallel_state.rank, sys.stdout, config.logging.heartbeat_seconds
        ),
        watchdog,
    )
    record, token_losses = StepRecord(context.device), TokenLosses()
    observer = Observers(ProgressObserver(progress), token_losses, record)
    engine = _build_engine(config, context, leaf_modules, partial(provide_model, observer))
    execution: Any = engine.module.execution
    stream: Stream = execution.stream
    ledger.engine, ledger.stream = engine, stream
    if checkpoint is not None:
        with watchdog.working(f"loading {checkpoint}"):
            load_checkpoint(checkpoint, engine, context, config)
        context.log.info("loaded %s at iteration %d", checkpoint, state.iteration)
    finite_check = None
    if not config.training.no_check_for_nan_in_loss_and_grad:
        layout = stream.layout_of(config.model.seq_length)
        finite_check = FiniteCheck(record, engine.module, engine.weights_not_finite, layout)
    writer = build_writer(config.logging, context.parallel_state.rank, config.to_dict())
    reporter = Reporter(config, context, writer, padded_vocab_size, stream)
    try:
        run = Training(
            config, context, engine, stream, provide_datasets, datasets, provide_batch, reporter, progress, state,
            Saver(engine, context, config, padded_vocab_size), finite_check, token_losses,
        )  # fmt: skip
        run.run()
    finally:
        writer.close()


def _checkpoint_to_load(config: Config, context: Context, padded_vocab_size: int) -> Path | None:
    """Choose the checkpoint, and check that it fits; None for a new run. Collective over all ranks."""
    with context.watchdog.working("choosing a checkpoint"):
        checkpoint = choose_checkpoint(config.checkpoint, context)
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, context.parallel_state.world_size, padded_vocab_size)
    elif config.checkpoint.load is not None:
        context.log.info("%s holds no checkpoint yet: a new run starts", config.checkpoint.load)
    return checkpoint


def _build_datasets(
    config: Config, context: Context, state: TrainState, provide_datasets: DatasetsProvider
) -> Datasets:
    """Build what the rest of the training reads, and warn of parts without data. Collective over all ranks."""
    lengths = Lengths.of(config, context.parallel_state.world_size, state)
    context.log.info("training to iteration %d: %s", lengths.iterations, lengths.left(state))
    with context.watchdog.working("building the data index"):
        datasets = provide_datasets(lengths.num_samples(config, state))
    wanted = parse_split(config.data.split)[1:]
    for part, share, data in zip(("validation", "test"), wanted, datasets[1:], strict=True):
        if data is None and share and config.training.eval_iters:
            context.log.warning("there are no %s data: --split or --data-path leaves none, so none are evaluated", part)
    return datasets


def _build_engine(
    config: Config,
    context: Context,
    leaf_modules: Sequence[type[nn.Module]],
    provide_model: Callable[[], nn.Module],
) -> Engine:
    """Build the model and its optimizer. Collective over all ranks."""
    world_size = context.parallel_state.world_size
    with context.watchdog.working("building the model"):
        return Engine(
            provide_model,
            leaf_modules,
            lambda model: parameter_groups(model, config.optimizer.weight_decay),
            config.optimizer,
            deepspeed_config(config, world_size),
            context.dtype,
            context.device,
            world_size,
        )


class Training:
    """The training loop of one run, with its state."""

    def __init__(
        self,
        config: Config,
        context: Context,
        engine: Engine,
        stream: Stream,
        provide_datasets: DatasetsProvider,
        datasets: Datasets,
        provide_batch: BatchProvider,
        reporter: Reporter,
        progress: StepProgress,
        state: TrainState,
        saver: Saver,
        finite_check: FiniteCheck | None,
        token_losses: TokenLosses,
    ) -> None:
        self._saver, self._watchdog, self._finite_check = saver, context.watchdog, finite_check
        self._config, self._context = config, context
        self._stream, self._token_losses = stream, token_losses
        self._engine, self._reporter, self._progress, self.state = engine, reporter, progress, state
        self._train_data, self._valid_data, self._test_data = datasets
        self._provide_datasets, self._provide_batch = provide_datasets, provide_batch
        self._plan_steps()
        parallel = context.parallel_state
        self._sampler = BatchSampler(
            config.training.micro_batch_size,
            parallel.data_parallel_rank,
            parallel.data_parallel_size,
            self._lengths.num_microbatches,
        )
        self._profiler = StepProfiler(config.logging, context)
        self._rollback = Rollback(config, engine, context)
        self._stop = StopSignal()
        self._started = time.monotonic()
        self._saved_iteration = state.iteration

    def run(self) -> None:
        """Train to the end or to a reason to stop; at the end, save and evaluate on the test part."""
        with closing(self._profiler):
            while (outcome := self._train_on()) == _ROLL_BACK:
                with self._watchdog.working(f"going back from iteration {self.state.iteration}"):
                    self.state = self._rollback.go_back(self.state)
                self._saved_iteration = self.state.iteration
                self._plan_steps()
        if outcome == _EXIT:
            return
        self._save()
        if self._config.training.eval_iters:
            self._evaluate(self._test_data, "test")

    def _plan_steps(self) -> None:
        """Plan the steps left, their data and their learning rates from the counts of the run so far."""
        config = self._config
        self._lengths = Lengths.of(config, self._context.parallel_state.world_size, self.state)
        self._schedule = LearningRateSchedule.from_config(config.optimizer, config.training, self.state.course)
        num_samples, *_ = self._lengths.num_samples(config, self.state)
        if self._train_data is not None and len(self._train_data) < num_samples:  # rolled back further than planned
            self._train_data, *_ = self._provide_datasets((num_samples, 0, 0))

    def _train_on(self) -> int:
        """Train on the data that follows the samples read so far."""
        steps = self._lengths.iterations - self.state.iteration
        with self._read(self._train_data, self.state.data_samples, steps) as batches:
            return self._train(batches)

    def _train(self, batches: Iterator[Batch]) -> int:
        """Take the steps left; return whether a reason to exit or to roll back came before the last."""
        config = self._config
        if self.state.iteration >= self._lengths.iterations:
            self._context.log.info("nothing to train: %s", self._lengths.left(self.state))
        self._reporter.restart()
        while self.state.iteration < self._lengths.iterations:
            outcome = self._step(batches)
            if outcome == _ROLL_BACK:
                return outcome
            iteration = self.state.iteration
            if config.training.eval_iters and iteration % config.training.eval_interval == 0:
                self._evaluate(self._valid_data, "validation")
            if config.checkpoint.save_interval and iteration % config.checkpoint.save_interval == 0:
                self._save()
            if outcome == _EXIT or (config.training.exit_interval and iteration % config.training.exit_interval == 0):
                self._save()
                self._context.log.info("exiting at iteration %d", iteration)
                return _EXIT
        return _CONTINUE

    def _step(self, stream: Iterator[Batch]) -> int:
        """Take one optimizer step; return whether all ranks must exit after it, or roll it back."""
        state, engine = self.state, self._engine
        batches = list(islice(stream, self._lengths.num_microbatches))
        num_tokens, attention_share, command = self._agree(batches)
        rate = self._learning_rate()
        if not num_tokens.item():
            self._skip_step()
        elif self._take_step(batches, num_tokens, rate, attention_share):
            return _ROLL_BACK
        if state.iteration % self._config.logging.log_interval == 0 or state.iteration == self._lengths.iterations:
            self._reporter.line(state, rate, self._lengths.iterations, engine.loss_scale, engine.gradient_norm())
        return command

    def _take_step(self, batches: Sequence[Batch], num_tokens: Tensor, rate: float, attention_share: float) -> bool:
        """Take a step and count it; return whether all ranks must roll it back. Collective over all ranks."""
        state, engine = self.state, self._engine
        self._progress.start_step(state.iteration + 1, self._num_units())
        with self._profiler.step(state.iteration + 1):
            loss = engine.train_step(self._inputs(batches), num_tokens, rate, self._check)
        self._progress.finish_step()
        dist.all_reduce(loss)
        state.advance(self._lengths.global_batch_size, self._config.model.seq_length)
        if self._rollback.judge(state.iteration, loss / num_tokens):
            return True
        self._reporter.add(state.iteration, loss / num_tokens, attention_share)
        state.skipped_iterations += engine.step_was_skipped
        return False

    def _skip_step(self) -> None:
        """Count a step whose labels are all masked. It has no gradient: weights and moments must not change."""
        state, first = self.state, self.state.data_samples
        state.advance(self._lengths.global_batch_size, self._config.model.seq_length)
        state.skipped_iterations += 1
        step = f"iteration {state.iteration} (samples {first} to {state.data_samples - 1})"
        self._context.log.warning("every label of %s is masked: no step is taken, the weights stay as they are", step)

    def _inputs(self, batches: Sequence[Batch]) -> Iterator[ModelInputs]:
        for number, batch in enumerate(batches):
            if self._finite_check:
                self._finite_check.start_microbatch(number)
            yield batch.inputs()

    def _check(self, loss: Tensor) -> None:
        """Check loss and gradients for NaN and infinity before the step is taken. Collective over all ranks.

        NotFiniteError where `loss`, this rank's, or a gradient of any rank is not finite, unless the loss scaler will
        skip the step and try a smaller scale.
        """
        fault = self._finite_check.finish(loss) if self._finite_check else None
        precision = self._config.precision
        is_scaled = precision.fp16 and (precision.loss_scale or self._engine.loss_scale > precision.min_loss_scale)
        if fault is None or is_scaled:
            return
        first, samples = self.state.data_samples, self._lengths.global_batch_size
        step = f"iteration {self.state.iteration + 1} (samples {first} to {first + samples - 1})"
        fault = f"{step}: the loss or gradient is not finite; {fault}"
        if not self._rollback.takes_faults:
            raise NotFiniteError(f"{fault}. The step is not taken and nothing is saved: {_RESUME}.")
        self._rollback.take_fault(fault)

    def _check_weights(self) -> None:
        """Raise NotFiniteError where the weights of any rank are not finite. Collective over all ranks."""
        fault = faulty_weights(self._engine.weights_not_finite())
        if fault is not None:
            raise NotFiniteError(f"iteration {self.state.iteration} is not saved: {fault}; {_RESUME}.")

    def _learning_rate(self) -> float:
        """Return the learning rate of the next step, which counts as taken."""
        state, samples = self.state, self._lengths.global_batch_size
        tokens = samples * self._config.model.seq_length
        return self._schedule.at(state.iteration + 1, state.consumed_samples + samples, state.consumed_tokens + tokens)

    def _read(self, data: SampleDataset | None, first_sample: int, num_steps: int) -> Prefetcher[Batch]:
        """Prefetch this rank's micro-batches of `num_steps` steps, in order."""
        last_sample = first_sample + num_steps * self._lengths.global_batch_size
        samples = self._sampler.microbatches(first_sample, last_sample)
        return Prefetcher(self._make_batches(data, samples), self._config.data.prefetch_microbatches)

    def _make_batches(self, data: SampleDataset | None, samples: Iterator[list[int]]) -> Iterator[Batch]:
        if self._context.device.type == "cuda":
            torch.cuda.set_device(self._context.device)  # a new thread pins memory through GPU 0 otherwise
        for indices in samples:
            assert data is not None, "a part that is read was asked for"
            yield self._provide_batch([data[i] for i in indices])

    def _agree(self, batches: Sequence[Batch]) -> tuple[Tensor, float, int]:
        """Return (unmasked tokens of the step over all ranks, the share of attention that documents leave, whether any
        rank wants to exit). Collective over all ranks."""
        limit = self._config.training.exit_duration_in_mins
        out_of_time = limit is not None and time.monotonic() - self._started >= limit * 60
        # Every rank of a sequence counts the whole of it.
        size = self._context.parallel_state.sequence_parallel_size
        tokens, squares = (sum(counts) / size for counts in zip(*map(_counts, batches), strict=True))
        wishes = torch.tensor([tokens, squares, self._stop.received or out_of_time], dtype=torch.float64)
        wishes = wishes.to(self._context.device)
        dist.all_reduce(wishes)
        whole = self._lengths.global_batch_size * self._config.model.seq_length**2
        return wishes[0].float(), wishes[1].item() / whole, _EXIT if wishes[2].item() > 0 else _CONTINUE

    def _forward_units(self) -> int:
        """Count the progress reports of the forward passes over one batch."""
        model = self._config.model
        chunks = -(-model.seq_length // self._stream.chunk_length)
        return model.num_layers * chunks * self._lengths.num_microbatches

    def _num_units(self) -> int:
        """Count the progress reports of one step: blocks that save their activations report forward alone."""
        recomputes = self._config.deepspeed.deepspeed_activation_checkpointing
        return self._forward_units() * (2 if recomputes or self._config.parallel.ds_sequence_parallel_fpdt else 1)

    def _evaluate(self, data: SampleDataset | None, part: str) -> None:
        if data is None:
            return
        with self._reporter.pause():
            self._evaluate_on(data, part)

    def _evaluate_on(self, data: SampleDataset, part: str) -> None:
        num_steps = self._config.training.eval_iters
        self._progress.start_step(self.state.iteration, num_steps * self._forward_units())
        totals = torch.zeros(2, dtype=torch.float64, device=self._context.device)
        by_position = self._loss_by_position()
        with self._read(data, 0, num_steps) as batches:
            for batch in batches:
                totals[0] += by_position.evaluate(batch, self._engine.evaluate)
                totals[1] += batch.num_tokens / self._context.parallel_state.sequence_parallel_size
        self._progress.finish_step()
        dist.all_reduce(totals)
        if not totals[1].item():
            self._context.log.warning("every label of the %s data that were read is masked: they have no loss", part)
            return
        loss = (totals[0] / totals[1]).item()
        self._reporter.evaluation(self.state.iteration, loss, part, by_position.buckets())

    def _loss_by_position(self) -> LossByPosition:
        length = self._config.model.seq_length
        return LossByPosition(bucket_edges(self._config.logging, length), length, self._stream, self._token_losses)

    def _save(self) -> None:
        """Save a checkpoint, where a folder is given and this iteration is not saved already."""
        if self._config.checkpoint.save is None or self._saved_iteration == self.state.iteration:
            return
        started = time.monotonic()
        self._check_weights()
        with self._reporter.pause(), self._watchdog.working(f"saving iteration {self.state.iteration}"):
            path = self._saver.save(Path(self._config.checkpoint.save), self.state)
        self._saved_iteration = self.state.iteration
        gib, seconds = self._saver.size_bytes / GIB, time.monotonic() - started
        self._context.log.info("saved %s (%.3g GiB in %.1f s)", path, gib, seconds)


def _counts(batch: Batch) -> tuple[int, int]:
    return batch.num_tokens, batch.squared_lengths
