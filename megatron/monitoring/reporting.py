"""Log lines and metrics of a run: of its iterations every --log-interval, and of its evaluations."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import psutil
import torch

from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, sample_lengths
from megatron.fpdt.disk_tier import DiskMeter
from megatron.fpdt.stream import Stream
from megatron.initialize import GIB, Context
from megatron.logging.compact_line import line_formatter
from megatron.logging.device_peak import peak_tflops
from megatron.logging.log_line import (
    Bucket,
    IterationRecord,
    PositionRecord,
    ValidationRecord,
    format_positions,
    format_validation,
)
from megatron.logging.run_history import SCALARS, position_scalar
from megatron.logging.writers import MetricWriter
from megatron.monitoring.loss_window import LossWindow
from megatron.planner.flops import (
    ThroughputReport,
    TrainingFlops,
    flops_of_checkpointing,
    flops_of_streaming,
    model_flops,
    throughput,
)

# Share of the time that may be spent waiting for the disk without a warning.
SLOW_DISK = 0.05


class Reporter:
    """Times the steps between log lines, and writes lines and metrics on rank 0."""

    def __init__(
        self,
        config: Config,
        context: Context,
        writer: MetricWriter,
        padded_vocab_size: int,
        stream: Stream,
        losses: LossWindow,
    ) -> None:
        self._config, self._context, self._writer, self._losses = config, context, writer, losses
        self._padded_vocab_size, self._stream = padded_vocab_size, stream
        name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else None
        self._peak_tflops = config.logging.peak_tflops or peak_tflops(name)
        self._has_slow_disk = False
        self._disk = DiskMeter(stream.store.disk_tier)
        # Length, and share of attention, of each step that is timed; none if all its labels are masked.
        self._steps: list[tuple[int, float]] = []
        self._lengths_vary = sample_lengths(config, context.parallel_state.world_size).vary
        self._last_line = 0  # iteration of the line before, where lines have no fixed interval
        self._format = line_formatter(config.logging.log_format, sys.stdout)
        self._pace = _Pace()
        self._started = time.monotonic()
        self._scalars: Callable[[], Mapping[str, float]] | None = None

    def add_once(self, scalars: Callable[[], Mapping[str, float]]) -> None:
        """Write what `scalars` returns with the metrics of the next line alone; it is called on rank 0."""
        self._scalars = scalars

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude this context from the times of the next line: evaluation, saving."""
        paused = time.monotonic()
        yield
        self._started += time.monotonic() - paused

    def continue_from(self, iteration: int) -> None:
        """Prepare for the next steps. The metrics of later iterations, which are repeated, are discarded."""
        if iteration:
            self._writer.discard_after(iteration)
        self._last_line = min(self._last_line, iteration)
        self._pace = _Pace()
        self.restart()

    def restart(self) -> None:
        """Start to time the steps of the next line here."""
        self._started = time.monotonic()
        self._steps.clear()
        self._disk.take()

    def count_step(self, seq_length: int, attention_share: float) -> None:
        """Count a step of sequences of this length, and the share of the attention that documents leave of it."""
        self._steps.append((seq_length, attention_share))

    def line(
        self,
        state: TrainState,
        learning_rate: float,
        train_iterations: int,
        loss_scale: float,
        grad_norm: float | None,
        of_model: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Write the line of the --log-interval that ends here, if a step was taken. Waits for the device.

        `of_model` are further fields of its `IterationRecord`, which the model reports.

        After a rollback, the losses are those of the whole interval, and the times those of the steps since.
        """
        if not self._steps:
            return
        for warning in self._losses.take_warnings():
            self._context.log.warning("%s", warning)
        interval = self._config.logging.line_interval
        losses = self._losses.after(max((state.iteration - 1) // interval * interval, self._last_line))
        finite = [loss for loss in losses if math.isfinite(loss)]
        state.nan_iterations += len(losses) - len(finite)
        seconds = (time.monotonic() - self._started) / len(self._steps)
        speed = self._throughput(state, seconds)
        record = IterationRecord(
            iteration=state.iteration,
            train_iterations=train_iterations,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            milliseconds=seconds * 1e3,
            learning_rate=learning_rate,
            global_batch_size=state.global_batch_size,
            loss=statistics.fmean(finite) if finite else None,
            seq_length=self._steps[-1][0] if self._lengths_vary else None,
            loss_scale=loss_scale,
            grad_norm=grad_norm,
            tokens_per_second_per_gpu=speed.tokens_per_second_per_gpu,
            model_tflops_per_gpu=speed.model_tflops_per_gpu,
            mfu=speed.mfu,
            hfu=speed.hfu,
            peak_gpu_gib=self._peak_gpu_gib(),
            host_gib=psutil.Process().memory_info().rss / GIB,
            host_pool_gib=self._stream.store.pinned_bytes / GIB,
            **self._disk_use(),
            skipped_iterations=state.skipped_iterations,
            nan_iterations=state.nan_iterations,
            hours_left=self._pace.seconds_left(state.iteration, train_iterations, seconds) / 3600,
            **of_model,
        )
        self._context.log.info("%s", self._format(record))
        values = {f"train/{name}": getattr(record, name) for name in SCALARS}
        self._writer.write(state.iteration, {name: value for name, value in values.items() if value is not None})
        self._write_once(state.iteration)
        if self._config.logging.log_interval is None:
            self._last_line = state.iteration
        self.restart()

    def _write_once(self, iteration: int) -> None:
        """Write the scalars of `add_once`, if they are still to be written."""
        if self._scalars is not None and self._context.is_first_rank:
            self._writer.write(iteration, self._scalars())
            self._scalars = None

    def evaluation(self, iteration: int, loss: float, part: str, buckets: Sequence[Bucket] = ()) -> None:
        """Write the line of an evaluation, and one with the losses by position if `buckets` has any."""
        record = ValidationRecord(iteration=iteration, loss=loss, part=part)
        self._context.log.info(format_validation(record))
        scalars = {f"{part}/loss": loss, f"{part}/perplexity": record.perplexity}
        if buckets:
            positions = PositionRecord(iteration=iteration, part=part, buckets=tuple(buckets))
            self._context.log.info(format_positions(positions))
            scalars |= {f"{part}/{position_scalar(bucket)}": bucket.loss for bucket in buckets}
        self._writer.write(iteration, scalars)

    def _disk_use(self) -> dict[str, float | None]:
        """Return the fields of the record on the disk, per step; warn once of one that is too slow."""
        use = self._disk.take()
        if use is None:
            return {}
        steps = len(self._steps)
        if use.stalled_seconds > SLOW_DISK * (time.monotonic() - self._started) and not self._has_slow_disk:
            self._has_slow_disk = True
            self._context.log.warning(
                "the disk is slower than compute: %.0f s of this interval were spent waiting for it; more or faster "
                "disks for --ds-sequence-parallel-fpdt-disk, more host memory, or longer sequences shorten this",
                use.stalled_seconds,
            )
        return {"disk_gib": use.num_bytes / GIB / steps, "disk_wait_milliseconds": use.stalled_seconds * 1e3 / steps}

    def _throughput(self, state: TrainState, seconds: float) -> ThroughputReport:
        """Return the throughput of steps that took `seconds` each, on average."""
        shares: dict[int, list[float]] = {}
        for length, share in self._steps:
            shares.setdefault(length, []).append(share)
        flops = [(self._flops(length, statistics.mean(each)), len(each)) for length, each in shares.items()]
        num_steps, mean_length = len(self._steps), statistics.mean(length for length, _ in self._steps)
        return throughput(
            tokens=state.global_batch_size * mean_length,
            seq_length=mean_length,
            seconds=seconds,
            num_gpus=self._context.parallel_state.world_size,
            flops_per_sequence=TrainingFlops(
                model=sum(each.model * count for each, count in flops) // num_steps,
                hardware=sum(each.hardware * count for each, count in flops) // num_steps,
            ),
            peak_tflops=self._peak_tflops,
        )

    def _flops(self, seq_length: int, attention_share: float) -> TrainingFlops:
        useful = model_flops(self._config.model, self._padded_vocab_size, seq_length, attention_share)
        recomputed = _recomputed_flops(self._config, self._stream, seq_length, attention_share)
        return TrainingFlops(model=useful, hardware=useful + recomputed)

    def _peak_gpu_gib(self) -> float | None:
        if self._context.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._context.device) / GIB


class _Pace:
    """The time of an iteration with the evaluations and the saving around it, since the first line.

    The steps before that line are slower: they compile kernels and allocate memory.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def seconds_left(self, iteration: int, last_iteration: int, step_seconds: float) -> float:
        """Estimate the time from now, the end of `iteration`, to the end of the last one."""
        now = time.monotonic()
        if self._first is None:
            self._first = iteration, now
        first, then = self._first
        pace = (now - then) / (iteration - first) if iteration > first else step_seconds
        return pace * (last_iteration - iteration)


def _recomputed_flops(config: Config, stream: Stream, seq_length: int, attention_share: float) -> int:
    model, parallel = config.model, config.parallel
    if parallel.ds_sequence_parallel_fpdt:
        layout, saving = stream.layout_of(seq_length), stream.saving_at(seq_length)
        return flops_of_streaming(model, layout, stream.slice_length, saving, attention_share)
    if config.deepspeed.deepspeed_activation_checkpointing:
        return flops_of_checkpointing(model, seq_length, attention_share)
    return 0
