"""Log line and metrics of a run after an iteration; losses stay on the device until then."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from megatron.checkpointing.train_state import TrainState
from megatron.config import Config
from megatron.fpdt.stream import Stream
from megatron.initialize import GIB, Context
from megatron.logging.device_peak import peak_tflops
from megatron.logging.log_line import (
    Bucket,
    IterationRecord,
    PositionRecord,
    ValidationRecord,
    format_iteration,
    format_positions,
    format_validation,
)
from megatron.logging.loss_watch import LossWatch
from megatron.logging.run_history import SCALARS, position_scalar
from megatron.logging.writers import MetricWriter
from megatron.planner.flops import (
    flops_of_checkpointing,
    flops_of_streaming,
    model_flops,
    throughput,
)


class Reporter:
    """Collects losses between log lines, on the device, and writes lines and metrics on rank 0."""

    def __init__(
        self,
        config: Config,
        context: Context,
        writer: MetricWriter,
        padded_vocab_size: int,
        stream: Stream,
    ) -> None:
        self._config, self._context, self._writer = config, context, writer
        self._padded_vocab_size, self._stream = padded_vocab_size, stream
        name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else None
        self._peak_tflops = config.logging.peak_tflops or peak_tflops(name)
        self._watch = LossWatch(config.logging.loss_spike_factor)
        self._losses: dict[int, Tensor] = {}  # by iteration; none for steps whose labels are all masked
        self._attention_shares: list[float] = []
        self._started = time.monotonic()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude this context from the times of the next line: evaluation, saving."""
        paused = time.monotonic()
        yield
        self._started += time.monotonic() - paused

    def restart(self) -> None:
        """Start the next line's iterations and times here."""
        self._started = time.monotonic()
        self._losses.clear()
        self._attention_shares.clear()

    def add(self, iteration: int, loss: Tensor, attention_share: float) -> None:
        """Count one iteration's mean token loss, a scalar on the device, and the attention left by documents."""
        self._losses[iteration] = loss
        self._attention_shares.append(attention_share)

    def line(
        self,
        state: TrainState,
        learning_rate: float,
        train_iterations: int,
        loss_scale: float,
        grad_norm: float | None,
    ) -> None:
        """Write the line of the iterations since the last one, if any has a loss. Waits for the device."""
        if not self._losses:
            return
        losses = torch.stack([*self._losses.values()]).tolist()
        finite = [loss for loss in losses if math.isfinite(loss)]
        state.nan_iterations += len(losses) - len(finite)
        for iteration, loss in zip(self._losses, losses, strict=True):
            if (warning := self._watch.look(iteration, loss)) is not None:
                self._context.log.warning("%s", warning)
        seconds = (time.monotonic() - self._started) / len(losses)
        model = self._config.model
        attention_share = statistics.mean(self._attention_shares)
        useful = model_flops(model, self._padded_vocab_size, model.seq_length, attention_share)
        speed = throughput(
            tokens=state.global_batch_size * model.seq_length,
            seq_length=model.seq_length,
            seconds=seconds,
            num_gpus=self._context.parallel_state.world_size,
            model_flops_per_sequence=useful,
            hardware_flops_per_sequence=useful + _recomputed_flops(self._config, self._stream, attention_share),
            peak_tflops=self._peak_tflops,
        )
        record = IterationRecord(
            iteration=state.iteration,
            train_iterations=train_iterations,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            milliseconds=seconds * 1e3,
            learning_rate=learning_rate,
            global_batch_size=state.global_batch_size,
            loss=statistics.fmean(finite) if finite else None,
            loss_scale=loss_scale,
            grad_norm=grad_norm,
            tokens_per_second_per_gpu=speed.tokens_per_second_per_gpu,
            model_tflops_per_gpu=speed.model_tflops_per_gpu,
            mfu=speed.mfu,
            hfu=speed.hfu,
            peak_gpu_gib=self._peak_gpu_gib(),
            host_gib=psutil.Process().memory_info().rss / GIB,
            host_pool_gib=self._stream.store.pool.allocated_bytes / GIB,
            skipped_iterations=state.skipped_iterations,
            nan_iterations=state.nan_iterations,
        )
        self._context.log.info(format_iteration(record))
        values = {f"train/{name}": getattr(record, name) for name in SCALARS}
        self._writer.write(state.iteration, {name: value for name, value in values.items() if value is not None})
        self.restart()

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

    def _peak_gpu_gib(self) -> float | None:
        if self._context.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._context.device) / GIB


def _recomputed_flops(config: Config, stream: Stream, attention_share: float) -> int:
    model, parallel = config.model, config.parallel
    if parallel.ds_sequence_parallel_fpdt:
        layout = stream.layout_of(model.seq_length)
        return flops_of_streaming(model, layout, stream.slice_length, stream.checkpoint_interval, stream.recompute)
    if config.deepspeed.deepspeed_activation_checkpointing:
        return flops_of_checkpointing(model, model.seq_length, attention_share)
    return 0
