"""The lines of the training log, in Megatron's form, and the parser that reads them back.

     iteration        1/     100 | consumed samples:            8 | ... | lm loss: 8.123456E+00 | ... |
     validation loss at iteration 100 | lm loss value: 8.123456E+00 | lm loss PPL: 3.371E+03 |
     validation loss by position at iteration 100 | 0-4096: 8.412345E+00 | 4096-8192: 7.834567E+00 |

The formatter and the parser share one table of columns, so that they always agree. A value that is unknown or does not
apply has no column.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_NOT_AVAILABLE = "n/a"  # an unknown value in logs of earlier versions
_LARGEST_EXPONENT = 700.0  # exp() of more overflows a double


@dataclass(frozen=True, kw_only=True)
class IterationRecord:
    """The values in one iteration's log line. None is a value that is unknown or does not apply."""

    iteration: int
    train_iterations: int
    consumed_samples: int
    consumed_tokens: int
    milliseconds: float
    """Mean wall time of an iteration since the last log line."""
    learning_rate: float
    global_batch_size: int
    seq_length: int | None = None
    """Tokens per sequence of the last iteration. Not in the line where all iterations have the same."""
    loss: float | None
    """Mean over the tokens of the iterations since the last log line; None if all of them were skipped."""
    loss_scale: float
    grad_norm: float | None
    router_aux_loss: float | None = None
    """Of a mixture of experts, without its coefficient; no part of `loss`."""
    expert_imbalance: float | None = None
    """The load of the busiest expert over the mean load, in the worst layer of a mixture of experts."""
    tokens_per_second_per_gpu: float | None
    model_tflops_per_gpu: float | None
    mfu: float | None
    """Fraction of the device's peak, 0 to 1; printed in percent."""
    hfu: float | None
    peak_gpu_gib: float | None
    host_gib: float | None
    host_pool_gib: float | None
    disk_gib: float | None = None
    """Read and written per iteration by this rank; not in the line of a run without a disk for chunks."""
    disk_wait_milliseconds: float | None = None
    """Of an iteration, in which the device had no work because of the disk. The same applies."""
    skipped_iterations: int
    nan_iterations: int
    hours_left: float | None = None
    """Estimated hours until the last iteration."""


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """The values in one evaluation's log line. `part` is "validation" or "test"."""

    iteration: int
    loss: float
    part: str = "validation"

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, _LARGEST_EXPONENT))


@dataclass(frozen=True)
class Bucket:
    """Positions from `first` to below `end`: the mean loss of their tokens, and the number of tokens."""

    first: int
    end: int
    loss: float
    num_tokens: float = 0.0
    """Not part of the log line."""


@dataclass(frozen=True, kw_only=True)
class PositionRecord:
    """The values in one evaluation's log line of losses by position."""

    iteration: int
    buckets: tuple[Bucket, ...]
    part: str = "validation"


LogRecord = IterationRecord | ValidationRecord | PositionRecord


@dataclass(frozen=True)
class _Column:
    label: str
    attribute: str
    form: str
    read: Callable[[str], float]
    is_optional: bool = False
    """Whether the value may be unknown."""


def _read_percent(text: str) -> float:
    return round(float(text.removesuffix("%")) / 100.0, 6)


_COLUMNS = (
    _Column("consumed samples", "consumed_samples", "12d", int),
    _Column("consumed tokens", "consumed_tokens", "14d", int),
    _Column("elapsed time per iteration (ms)", "milliseconds", ".1f", float),
    _Column("learning rate", "learning_rate", ".3E", float),
    _Column("global batch size", "global_batch_size", "5d", int),
    _Column("sequence length", "seq_length", "7d", int, is_optional=True),
    _Column("lm loss", "loss", ".6E", float, is_optional=True),
    _Column("loss scale", "loss_scale", ".1f", float),
    _Column("grad norm", "grad_norm", ".3f", float, is_optional=True),
    _Column("router aux loss", "router_aux_loss", ".6E", float, is_optional=True),
    _Column("expert imbalance", "expert_imbalance", ".2f", float, is_optional=True),
    _Column("tokens/s/GPU", "tokens_per_second_per_gpu", ".1f", float, is_optional=True),
    _Column("model TFLOP/s", "model_tflops_per_gpu", ".2f", float, is_optional=True),
    _Column("MFU", "mfu", ".1%", _read_percent, is_optional=True),
    _Column("HFU", "hfu", ".1%", _read_percent, is_optional=True),
    _Column("peak GPU memory (GiB)", "peak_gpu_gib", ".2f", float, is_optional=True),
    _Column("host memory (GiB)", "host_gib", ".2f", float, is_optional=True),
    _Column("host pool (GiB)", "host_pool_gib", ".2f", float, is_optional=True),
    _Column("disk traffic (GiB)", "disk_gib", ".2f", float, is_optional=True),
    _Column("waiting for disk (ms)", "disk_wait_milliseconds", ".1f", float, is_optional=True),
    _Column("ETA (h)", "hours_left", ".4f", float, is_optional=True),
    _Column("number of skipped iterations", "skipped_iterations", "3d", int),
    _Column("number of nan iterations", "nan_iterations", "3d", int),
)
_ITERATION = re.compile(r"(?:^|\s)iteration +(\d+)/ *(\d+) \| (.*)\|")
_VALIDATION = re.compile(r"(?:^|\s)(validation|test) loss at iteration (\d+) \| lm loss value: (\S+) \|")

_POSITIONS = re.compile(r"(?:^|\s)(validation|test) loss by position at iteration (\d+) \|(.*)\|")
_BUCKET = re.compile(r" (\d+)-(\d+): (\S+) ")


def format_iteration(record: IterationRecord) -> str:
    """Return the log line of one iteration, without a newline."""
    values = ((column, getattr(record, column.attribute)) for column in _COLUMNS)
    columns = "".join(f" {column.label}: {value:{column.form}} |" for column, value in values if value is not None)
    return f" iteration {record.iteration:8d}/{record.train_iterations:8d} |{columns}"


def format_validation(record: ValidationRecord) -> str:
    """Return the log line of one evaluation, without a newline."""
    return (
        f" {record.part} loss at iteration {record.iteration} | lm loss value: {record.loss:.6E} | "
        f"lm loss PPL: {record.perplexity:.6E} |"
    )


def format_positions(record: PositionRecord) -> str:
    """Return the log line of the losses by position, without a newline."""
    buckets = "".join(f" {bucket.first}-{bucket.end}: {bucket.loss:.6E} |" for bucket in record.buckets)
    return f" {record.part} loss by position at iteration {record.iteration} |{buckets}"


def parse_line(line: str) -> LogRecord | None:
    """Return the record in a line, or None if it is neither an iteration's nor an evaluation's.

    A launcher's prefix and columns that this version does not know are skipped. A line with a damaged column or without
    one that is always known, as in a truncated log, is not a record.
    """
    if match := _VALIDATION.search(line):
        return ValidationRecord(iteration=int(match[2]), loss=float(match[3]), part=match[1])
    if match := _POSITIONS.search(line):
        found = _BUCKET.findall(match[3])
        buckets = tuple(Bucket(int(first), int(end), float(loss)) for first, end, loss in found)
        return PositionRecord(iteration=int(match[2]), part=match[1], buckets=buckets)
    if match := _ITERATION.search(line):
        return _parse_iteration(int(match[1]), int(match[2]), match[3])
    return None


def parse_log(lines: Iterable[str]) -> Iterator[LogRecord]:
    """Yield the records among `lines`."""
    for line in lines:
        if (record := parse_line(line)) is not None:
            yield record


def _parse_iteration(iteration: int, train_iterations: int, rest: str) -> IterationRecord | None:
    texts = dict(_split_column(part) for part in rest.split(" |") if ":" in part)
    values: dict[str, float | None] = {}
    for column in _COLUMNS:
        text = texts.get(column.label, _NOT_AVAILABLE if column.is_optional else "")
        try:
            values[column.attribute] = None if text == _NOT_AVAILABLE else column.read(text)
        except ValueError:
            return None
    return IterationRecord(iteration=iteration, train_iterations=train_iterations, **values)  # type: ignore[arg-type]


def _split_column(part: str) -> tuple[str, str]:
    label, _, text = part.rpartition(":")
    return label.strip(), text.strip()
