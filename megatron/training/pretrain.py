"""Construction of a run: its checkpoint, data, engine and observers, and then its training loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpointing import Saver, check_checkpoint, choose_checkpoint, load_checkpoint, starting_state
from megatron.checkpointing.adapters import whole_source
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, deepspeed_config, default_batch_notes
from megatron.config.settings_file import settings_lines
from megatron.engine.engine import Engine
from megatron.fpdt.observer import Observer, Observers
from megatron.fpdt.stream import Stream
from megatron.initialize import Context
from megatron.logging.progress import build_progress
from megatron.logging.writers import build_writer
from megatron.monitoring.finite_check import FiniteCheck, StepRecord
from megatron.monitoring.loss_by_position import TokenLosses
from megatron.monitoring.loss_window import LossWindow
from megatron.monitoring.out_of_memory import Ledger
from megatron.monitoring.reporting import Reporter
from megatron.monitoring.step_progress import ProgressObserver
from megatron.optimizer.param_groups import parameter_groups
from megatron.ranks.watchdog import WatchedProgress
from megatron.training.data import TrainingData
from megatron.training.lengths import Lengths
from megatron.training.loop import Training
from megatron.training.providers import Providers
from megatron.training.run import Run
from megatron.weights.published_config import has_weights


def pretrain(
    config: Config,
    context: Context,
    padded_vocab_size: int,
    providers: Providers,
    ledger: Ledger,
    introduce: Callable[[Lengths, TrainState], None],
) -> None:
    """Train from the newest checkpoint, or from scratch, to the end that the configuration sets.

    `ledger` gets the engine and the stream, whose memory it reports. `introduce` logs what the run is, before anything
    large is built.
    """
    watchdog, world_size = context.watchdog, context.parallel_state.world_size
    context.log.info("settings, as a file for --config:")
    for line in settings_lines(config):
        context.log.info("  %s", line)
    for note in (*config.notes, *default_batch_notes(config, world_size)):
        context.log.info("note: %s", note)
    checkpoint = _checkpoint_to_load(config, context, padded_vocab_size)
    state = starting_state(checkpoint, config, context)
    lengths = Lengths.of(config, world_size, state)
    introduce(lengths, state)
    _warn_of_unreached(lengths, state, context)
    with watchdog.working("building the data index"):
        data = TrainingData(config, context, providers, lengths.num_samples(config, state))
    progress = WatchedProgress(
        build_progress(
            config.logging.progress, context.parallel_state.rank, sys.stdout, config.logging.heartbeat_seconds
        ),
        watchdog,
    )
    record, token_losses = StepRecord(context.device), TokenLosses()
    observer = Observers(ProgressObserver(progress), token_losses, record)
    engine = _build_engine(config, context, providers, observer)
    execution: Any = engine.module.execution
    stream: Stream = execution.stream
    ledger.engine, ledger.stream = engine, stream
    if checkpoint is not None:
        with watchdog.working(f"loading {checkpoint}"):
            load_checkpoint(checkpoint, engine, context, config)
        context.log.info("loaded %s at iteration %d", checkpoint, state.iteration)
    elif config.model.hf_model is not None:
        with watchdog.working(f"loading {config.model.hf_model}"):
            _load_published_weights(config, engine, context)
    finite_check = None
    if not config.training.no_check_for_nan_in_loss_and_grad:
        finite_check = FiniteCheck(record, engine.module, engine.weights_not_finite)
    losses = _build_loss_window(config)
    writer = build_writer(config.logging, context.parallel_state.rank, config.to_dict())
    reporter = Reporter(config, context, writer, padded_vocab_size, stream, losses)
    reporter.add_once(ledger.scalars)
    run = Run(config, context, engine, stream, progress, reporter, losses, token_losses, finite_check)
    try:
        Training(run, data, Saver(engine, context, config, padded_vocab_size), state).run()
    finally:
        writer.close()


def _load_published_weights(config: Config, engine: Engine, context: Context) -> None:
    """Load the weights of the folder of --hf-model, if it has any, and adapters. Collective over all ranks."""
    folder = Path(config.model.hf_model or "")
    if config.adapters.is_used:
        engine.load_state(whole_source(engine, config, None), with_optimizer=False)
        context.log.info("loaded the weights of %s, which are frozen, and %s", folder, _adapters(config))
        return
    if not has_weights(folder):
        if context.is_first_rank:
            context.log.warning("%s has no weights: training starts from random ones", folder)
        return
    from megatron.hf.weights import folder_source  # imports transformers, which native models do not need

    engine.load_state(folder_source(folder), with_optimizer=False)
    context.log.info("loaded the weights of %s", folder)


def _adapters(config: Config) -> str:
    folder = config.adapters.load_adapter
    return "new adapters" if folder is None else f"the adapters of {folder}"


def _checkpoint_to_load(config: Config, context: Context, padded_vocab_size: int) -> Path | None:
    """Choose the checkpoint, and check that it fits; None for a new run. Collective over all ranks."""
    with context.watchdog.working("choosing a checkpoint"):
        checkpoint = choose_checkpoint(config.checkpoint, context)
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, context.parallel_state.world_size, padded_vocab_size)
    elif config.checkpoint.load is not None:
        context.log.info("%s holds no checkpoint yet: a new run starts", config.checkpoint.load)
    return checkpoint


def _warn_of_unreached(lengths: Lengths, state: TrainState, context: Context) -> None:
    """Warn of phases of --seq-length-schedule that the training does not reach."""
    unreached = lengths.unreached(state)
    if unreached and context.is_first_rank:
        context.log.warning(
            "the training ends before its sequences have %s tokens: raise its length, or shorten "
            "--seq-length-schedule", " and ".join(map(str, unreached)),
        )  # fmt: skip


def _build_engine(config: Config, context: Context, providers: Providers, observer: Observer) -> Engine:
    """Build the model and its optimizer. Collective over all ranks."""
    world_size = context.parallel_state.world_size
    with context.watchdog.working("building the model"):
        return Engine(
            lambda: providers.model(observer),
            providers.leaf_modules,
            lambda model: parameter_groups(model, config.optimizer.weight_decay),
            config.optimizer,
            deepspeed_config(config, world_size),
            context.device,
        )


def _build_loss_window(config: Config) -> LossWindow:
    """Build a window that holds the losses of a log line even after a rollback to the last checkpoint."""
    logging, save_interval = config.logging, config.checkpoint.save_interval or 0
    return LossWindow(logging.loss_spike_factor, logging.line_interval + save_interval)
