"""The log line of one iteration for a terminal of 120 columns, and the choice between it and Megatron's form.

     step  12/100  loss 2.3456  norm 1.234  lr 1.20e-04  301 tok/s/GPU  MFU 51.6%  29:01  101.4 GiB  ETA 1d 18h

Nothing parses it: a file gets Megatron's form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TextIO

from megatron.config.logging import LogFormat
from megatron.logging.log_line import IterationRecord, format_iteration
from megatron.logging.progress import format_duration

LineFormatter = Callable[[IterationRecord], str]


def line_formatter(log_format: LogFormat, stream: TextIO) -> LineFormatter:
    """Return what formats the lines of --log-format on `stream`; auto is compact on a terminal."""
    is_compact = stream.isatty() if log_format == "auto" else log_format == "compact"
    return format_compact if is_compact else format_iteration


def format_compact(record: IterationRecord) -> str:
    """Return the log line of one iteration, without a newline."""
    return " " + "  ".join(_parts(record))


def _parts(record: IterationRecord) -> Iterator[str]:
    total = str(record.train_iterations)
    yield f"step {record.iteration:{len(total)}d}/{total}"
    yield "no loss" if record.loss is None else f"loss {record.loss:.4f}"
    if record.grad_norm is not None:
        yield f"norm {record.grad_norm:{'#.4g' if record.grad_norm < 1000 else '.2e'}}"
    yield f"lr {record.learning_rate:.2e}"
    if record.tokens_per_second_per_gpu is not None:
        yield f"{record.tokens_per_second_per_gpu:,.0f} tok/s/GPU"
    if record.mfu is not None:
        yield f"MFU {record.mfu:.1%}"
    elif record.model_tflops_per_gpu is not None:
        yield f"{record.model_tflops_per_gpu:.2f} TFLOP/s"
    yield _step_time(record.milliseconds / 1e3)
    gib = record.host_gib if record.peak_gpu_gib is None else record.peak_gpu_gib
    if gib is not None:
        yield f"{gib:.1f} GiB"
    if record.seq_length is not None:
        yield f"length {record.seq_length:,}"
    if record.expert_imbalance is not None:
        yield f"imbalance {record.expert_imbalance:.2f}"
    for name, count in (("skipped", record.skipped_iterations), ("nan", record.nan_iterations)):
        if count:
            yield f"{name} {count}"
    if record.hours_left is not None:
        yield f"ETA {format_duration(record.hours_left * 3600)}"


def _step_time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 60 else format_duration(seconds)
