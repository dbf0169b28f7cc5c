"""The entry point that the training programs share: from argv to an exit code, and from samples to training."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch.distributed as dist

from megatron.arguments import parse_args
from megatron.checkpointing import CheckpointError, only_writer
from megatron.config import Config, ConfigError, SampleLengths, sample_lengths, validate
from megatron.core.sequence_layout import SequenceLayout
from megatron.data.batch import Batch, Sample, slice_batch
from megatron.data.errors import DataError
from megatron.fpdt.disk_files import DiskError
from megatron.fpdt.host_pool import HostMemoryError
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.settings import with_hugging_face_model
from megatron.initialize import Context, device_type, initialize
from megatron.launch.determinism import use_deterministic_kernels
from megatron.launch.disk import with_measured_disk
from megatron.launch.execution import plan_execution, plan_of_run
from megatron.launch.introduction import Introduction
from megatron.launch.link import with_measured_link
from megatron.launch.model_check import check_model
from megatron.launch.models import model_source
from megatron.launch.preflight import DataCheck, Vocabulary, check_inputs
from megatron.monitoring.finite_check import NotFiniteError
from megatron.monitoring.out_of_memory import Ledger, OutOfMemory
from megatron.ops.attention import AttentionUnavailable
from megatron.ranks.interrupts import end_interrupted, interruptible
from megatron.ranks.watchdog import EXIT_CODE, SECONDS_FOR_OTHERS, RankLost, Watchdog
from megatron.ranks.world import World
from megatron.tokenizer import TokenizerError
from megatron.training.pretrain import pretrain
from megatron.training.providers import DatasetsProvider, Providers
from megatron.training.rollback import RollbackError
from megatron.weights.errors import WeightsError

USER_ERRORS = (
    ConfigError,
    DataError,
    TokenizerError,
    CheckpointError,
    WeightsError,
    HostMemoryError,
    DiskError,
    OutOfMemory,
    NotFiniteError,
    RollbackError,
    AttentionUnavailable,
    UnsupportedModelError,
)
# For a run with non-finite numbers; other errors that the user can fix give 2.
NOT_FINITE_EXIT_CODE = 5
UNFORESEEN_EXIT_CODE = 1


@dataclass(frozen=True)
class SampleSource:
    """The source of the samples."""

    provide_datasets: DatasetsProvider
    to_sample: Callable[[Any], Sample]
    """Convert an item of the datasets to a sample."""


SourceProvider = Callable[[Config, Vocabulary, SampleLengths], SampleSource]


def run(
    argv: Sequence[str],
    check_data: DataCheck,
    provide_source: SourceProvider,
    settle: Callable[[Config], Config] = lambda config: config,
    record_place: Callable[[str], object] | None = None,
) -> int:
    """Run and return the exit code. Inputs are checked before anything is allocated.

    An error that the user can fix is one line on rank 0.

    `settle` sets what the program does not leave to the flags. `record_place` gets every place that this rank reaches.
    """
    try:
        world = World.from_environment()
    except ConfigError as error:
        return report(error, 0)
    watchdog = Watchdog(world.rank, world.size, record_place=record_place)
    code = 0
    try:
        with interruptible(watchdog):
            config = with_hugging_face_model(settle(parse_args(argv)), world.size)
            validate(config, world.size, device_type())
            if config.training.deterministic_mode:
                use_deterministic_kernels(device_type())
            vocabulary = check_inputs(config, world.size, check_data)
            context = initialize(config, watchdog)
            verdict = check_model(config, context)
            context = with_measured_disk(config, with_measured_link(config, context))
            source = provide_source(config, vocabulary, sample_lengths(config, world.size))
            train(config, context, vocabulary.padded_size, source, verdict)
    except (Exception, KeyboardInterrupt) as error:
        code = end_by(error, watchdog)
    # After an error the other ranks may be gone, and a group of several waits for all.
    if dist.is_initialized() and (code == 0 or world.size == 1):
        dist.destroy_process_group()
    watchdog.close()
    return code


def end_by(error: BaseException, watchdog: Watchdog) -> int:
    """Report why the run ends, to the user and to the other ranks; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one Ctrl-C may come several times
        return end_interrupted(watchdog)
    if isinstance(error, RankLost):
        sys.stderr.write(f"error on rank {watchdog.rank}: {error}\n")
        return EXIT_CODE
    if comes_of_a_collective(error):
        watchdog.wait_for_verdict()
    if isinstance(error, USER_ERRORS):
        watchdog.fail(f"stopped: {error}", exit_code_of(error))
        if watchdog.rank:
            watchdog.close()  # which rank 0 waits for
        return report(error, watchdog.rank)
    watchdog.fail(f"failed: {type(error).__name__}: {error}", UNFORESEEN_EXIT_CODE)
    traceback.print_exception(error)
    sys.stderr.write(f"error on rank {watchdog.rank}: it failed in {watchdog.place}, as above\n")
    return UNFORESEEN_EXIT_CODE


def comes_of_a_collective(error: BaseException | None) -> bool:
    """Return whether a collective failed, as after the death of another rank; its error may be wrapped in others."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def exit_code_of(error: Exception) -> int:
    """Return the exit code of an error that the user can fix."""
    return NOT_FINITE_EXIT_CODE if isinstance(error, NotFiniteError | RollbackError) else 2


def report(error: Exception, rank: int) -> int:
    """Write the error once: other ranks first give rank 0 time to write it, and the launcher time to end them."""
    if rank:
        time.sleep(SECONDS_FOR_OTHERS)
    sys.stderr.write(f"error: {error}\n" if rank == 0 else f"error on rank {rank}: {error}\n")
    return exit_code_of(error)


def train(config: Config, context: Context, padded_vocab_size: int, source: SampleSource, verdict: str) -> None:
    """Build the model, the batches and the datasets, and train. `verdict` is that of `check_model`.

    OutOfMemory, with a table of what uses the memory, where GPU or host memory runs out.
    """
    parallel_state, chosen = context.parallel_state, plan_execution(config, context, padded_vocab_size)
    execution = chosen.execution
    longest_chunk = execution.chunk_size if execution.fpdt else config.model.seq_length
    model = model_source(config, context, padded_vocab_size, execution)

    def provide_batch(items: Sequence[Any]) -> Batch:
        samples = [source.to_sample(item) for item in items]
        length = len(samples[0].tokens) - 1
        return slice_batch(
            samples,
            SequenceLayout(length, min(longest_chunk, length), parallel_state.sequence_parallel_size),
            parallel_state.sequence_parallel_rank,
            pin=context.device.type == "cuda",
            restart_positions=config.data.reset_position_ids,
            separate_documents=config.data.reset_attention_mask,
        )

    providers = Providers(model.provide, model.leaf_modules, source.provide_datasets, provide_batch)
    ledger = Ledger(context, partial(plan_of_run, config, context, padded_vocab_size, context.host_memory_bytes))
    with only_writer(config.checkpoint, context), ledger.reporting_out_of_memory():
        of_model = {"checked": verdict, "experts": model.experts}
        introduction = Introduction(config, context, padded_vocab_size, chosen, of_model)
        pretrain(config, context, padded_vocab_size, providers, ledger, introduction.log)


def leave(code: int) -> NoReturn:
    """End the process without tearing down the interpreter.

    A communication thread may still be releasing a tensor, which needs a live interpreter: without one it aborts, and
    a run that is finished and saved would end with an error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
