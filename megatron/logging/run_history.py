"""The history of a run, read from its TensorBoard events or from its log.

Both give the same series: name to iteration to value. A resumed run has reported some iterations twice: the later
report wins, and reports from beyond the point where it resumed are dropped, as their weights were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from megatron.config.packages import require_package
from megatron.logging.log_line import Bucket, IterationRecord, LogRecord, PositionRecord, parse_log

# Fields of an `IterationRecord` that are written as train/NAME; consumed_tokens is for plots over tokens.
SCALARS = (
    "loss", "router_aux_loss", "expert_imbalance", "learning_rate", "grad_norm", "loss_scale", "milliseconds",
    "seq_length", "tokens_per_second_per_gpu", "model_tflops_per_gpu", "mfu", "hfu", "peak_gpu_gib", "host_gib",
    "host_pool_gib", "disk_gib", "disk_wait_milliseconds", "consumed_tokens", "skipped_iterations", "nan_iterations",
)  # fmt: skip

EVENTS = "events.out.tfevents.*"
MILLISECONDS_PER_HOUR = 3_600_000.0
PLANNED = "plan/"  # before the name of a scalar of training: the planner's estimate of it
MEMORY = "memory/"  # before gpu/OWNER and host/OWNER: GiB of rank 0
_POSITIONS = "loss_by_position/"

Point = tuple[str, int, float]  # name, iteration, value


def position_scalar(bucket: Bucket) -> str:
    """Return the name of a bucket's scalar, below the part's; zero-padded, so that TensorBoard sorts by position."""
    return f"{_POSITIONS}{bucket.first:08d}-{bucket.end:08d}"


@dataclass
class RunHistory:
    """The series of one run, each ascending by iteration."""

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    _last: int = 0

    @classmethod
    def of(cls, name: str, points: Iterable[Point]) -> RunHistory:
        """Collect points, given in the order in which they were reported."""
        history = cls(name)
        for point in points:
            history._add(*point)
        return history

    def _add(self, name: str, iteration: int, value: float) -> None:
        if iteration < self._last:
            for values in self.series.values():
                for later in [known for known in values if known >= iteration]:
                    del values[later]
        self._last = iteration
        self.series.setdefault(name, {})[iteration] = value

    def train(self, name: str) -> dict[int, float]:
        """Return one of `SCALARS` by iteration; empty where it was never reported."""
        return self.series.get(f"train/{name}", {})

    def hours(self) -> dict[int, float]:
        """Return the hours of training by iteration, without evaluation, saving and pauses between restarts.

        Iterations before the first reported one count as if each had taken as long as that one.
        """
        milliseconds = self.train("milliseconds")
        lengths = (end - start for start, end in zip([0, *milliseconds], milliseconds, strict=False))
        times = (length * each for length, each in zip(lengths, milliseconds.values(), strict=True))
        return {i: total / MILLISECONDS_PER_HOUR for i, total in zip(milliseconds, accumulate(times), strict=True)}

    def marks(self, counter: str) -> list[int]:
        """Return the iterations of the lines at which a counter is higher than in the line before."""
        values = self.train(counter)
        pairs = zip([0.0, *values.values()], values.items(), strict=False)
        return [iteration for before, (iteration, value) in pairs if value > before]

    def positions(self, part: str = "validation") -> list[Bucket]:
        """Return the losses by position of the last evaluation."""
        evaluations = self.position_history(part)
        return evaluations[max(evaluations)] if evaluations else []

    def position_history(self, part: str = "validation") -> dict[int, list[Bucket]]:
        """Return the losses by position of each evaluation, by iteration."""
        prefix = f"{part}/{_POSITIONS}"
        evaluations: dict[int, list[Bucket]] = {}
        for name in sorted(name for name in self.series if name.startswith(prefix)):  # zero-padded positions
            first, _, end = name.removeprefix(prefix).partition("-")
            for iteration, loss in self.series[name].items():
                evaluations.setdefault(iteration, []).append(Bucket(int(first), int(end), loss))
        return evaluations


def read_run(path: Path) -> RunHistory:
    """Read a run's folder, or one log file. Events are preferred; the run may still be in progress.

    Raises:
        OSError: there is no such file.
        ValueError: nothing was reported there, or by more than one run.
    """
    if path.is_file():
        return _read_log(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a run, or its log.")
    events = sorted(path.rglob(EVENTS), key=lambda file: file.name)  # whose names begin with the time
    folders = sorted({str(file.parent) for file in events})
    if len(folders) > 1:
        raise ValueError(f"{path} holds the events of several runs ({', '.join(folders)}); give one of these folders.")
    if events:
        require_package("tensorboard", f"{path}, a folder with TensorBoard events,")
    history = RunHistory.of(path.name or str(path), _event_points(events))
    if history.series:
        return history
    logs = sorted(path.glob("*.log"))
    if len(logs) != 1:
        found = f"{len(logs)} files *.log" if logs else "no file *.log"
        raise ValueError(f"{path} holds no TensorBoard events and {found}; give a folder with events, or one log file.")
    return _read_log(logs[0], path.name)


def _read_log(path: Path, name: str = "") -> RunHistory:
    with path.open(encoding="utf-8", errors="replace") as lines:
        history = RunHistory.of(name or path.stem, _log_points(parse_log(lines)))
    if not history.series:
        raise ValueError(
            f"{path} has no line ` iteration 1/ 100 | ... | lm loss: ...`; give the text that pretrain_gpt.py printed, "
            "for example by `... 2>&1 | tee train.log`, in the form of --log-format megatron."
        )
    return history


def _event_points(files: Iterable[Path]) -> Iterator[Point]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in files:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    yield value.tag, event.step, value.tensor.float_val[0]


def _log_points(records: Iterable[LogRecord]) -> Iterator[Point]:
    for record in records:
        if isinstance(record, IterationRecord):
            values = {name: getattr(record, name) for name in SCALARS}
            yield from ((f"train/{k}", record.iteration, float(v)) for k, v in values.items() if v is not None)
        elif isinstance(record, PositionRecord):
            for bucket in record.buckets:
                yield f"{record.part}/{position_scalar(bucket)}", record.iteration, bucket.loss
        else:
            yield f"{record.part}/loss", record.iteration, record.loss
