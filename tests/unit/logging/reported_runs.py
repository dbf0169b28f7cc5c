"""Runs as they would have reported themselves, for what reads them back."""

from dataclasses import replace
from pathlib import Path

from megatron.logging.log_line import (
    Bucket,
    IterationRecord,
    PositionRecord,
    ValidationRecord,
    format_iteration,
    format_positions,
    format_validation,
)
from megatron.logging.run_history import SCALARS, position_scalar
from megatron.logging.writers import TensorBoardWriter

RECORD = IterationRecord(
    iteration=1, train_iterations=100, consumed_samples=1, consumed_tokens=1000, milliseconds=3_600_000.0,
    learning_rate=1e-4, global_batch_size=1, loss=8.0, loss_scale=1.0, grad_norm=1.0, tokens_per_second_per_gpu=1.0,
    model_tflops_per_gpu=1.0, mfu=0.5, hfu=0.6, peak_gpu_gib=7.0, host_gib=9.0, host_pool_gib=5.0,
    skipped_iterations=0, nan_iterations=0,
)  # fmt: skip
BUCKETS = (Bucket(0, 512, 3.5), Bucket(512, 1024, 2.5))


def record(iteration: int, **values: float | None) -> IterationRecord:
    return replace(RECORD, iteration=iteration, consumed_tokens=1000 * iteration, **values)  # type: ignore[arg-type]


def write_events(folder: Path, records: list[IterationRecord]) -> None:
    """As the reporter writes them, in a file of their own."""
    writer = TensorBoardWriter(str(folder))
    for each in records:
        values = {f"train/{name}": getattr(each, name) for name in SCALARS}
        writer.write(each.iteration, {name: value for name, value in values.items() if value is not None})
        writer.write(each.iteration, {"validation/loss": 3.0})
        writer.write(each.iteration, {f"validation/{position_scalar(bucket)}": bucket.loss for bucket in BUCKETS})
    writer.close()


def write_log(path: Path, records: list[IterationRecord]) -> None:
    with path.open("a") as log:
        for each in records:
            log.write(format_iteration(each) + "\n")
            log.write(format_validation(ValidationRecord(iteration=each.iteration, loss=3.0)) + "\n")
            log.write(format_positions(PositionRecord(iteration=each.iteration, buckets=BUCKETS)) + "\n")
