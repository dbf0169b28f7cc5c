import math
from dataclasses import fields, replace

import pytest

from megatron.logging.log_line import (
    Bucket,
    IterationRecord,
    PositionRecord,
    ValidationRecord,
    format_iteration,
    format_positions,
    format_validation,
    parse_line,
    parse_log,
)

RECORD = IterationRecord(
    iteration=1,
    train_iterations=100,
    consumed_samples=8,
    consumed_tokens=65_536,
    milliseconds=123.4,
    learning_rate=1e-4,
    global_batch_size=8,
    loss=8.123456,
    loss_scale=1.0,
    grad_norm=1.234,
    tokens_per_second_per_gpu=531_085.9,
    model_tflops_per_gpu=412.34,
    mfu=0.417,
    hfu=0.502,
    peak_gpu_gib=7.12,
    host_gib=91.5,
    host_pool_gib=80.25,
    skipped_iterations=0,
    nan_iterations=0,
    hours_left=12.25,
)
OF_SOME_RUNS = {
    "seq_length": 131072, "router_aux_loss": 1.25, "expert_imbalance": 3.5,
    "disk_gib": 1.5, "disk_wait_milliseconds": 12.5,
}  # fmt: skip


def test_the_line_has_megatrons_form():
    line = format_iteration(RECORD)
    assert line.startswith(
        " iteration        1/     100 | consumed samples:            8 | consumed tokens:          65536 | "
        "elapsed time per iteration (ms): 123.4 | learning rate: 1.000E-04 | global batch size:     8 | "
        "lm loss: 8.123456E+00 | loss scale: 1.0 | grad norm: 1.234 | "
    )
    assert " | MFU: 41.7% | HFU: 50.2% | peak GPU memory (GiB): 7.12 | host memory (GiB): 91.50 | host pool" in line
    assert line.endswith(" | ETA (h): 12.2500 | number of skipped iterations:   0 | number of nan iterations:   0 |")


def test_an_iteration_survives_writing_and_reading():
    assert parse_line(format_iteration(RECORD)) == RECORD


def test_columns_of_some_runs_are_only_in_their_lines():
    record = replace(RECORD, **OF_SOME_RUNS)
    line = format_iteration(record)
    assert " | global batch size:     8 | sequence length:  131072 | lm loss: " in line
    assert " | grad norm: 1.234 | router aux loss: 1.250000E+00 | expert imbalance: 3.50 | tokens/s/GPU: " in line
    assert " | disk traffic (GiB): 1.50 | waiting for disk (ms): 12.5 | ETA (h): " in line
    assert parse_line(line) == record


def test_unknown_values_have_no_column():
    optional = {field.name: None for field in fields(IterationRecord) if "None" in str(field.type)}
    unknown = replace(RECORD, **optional)
    line = format_iteration(unknown)
    assert line.count("|") == format_iteration(replace(RECORD, **OF_SOME_RUNS)).count("|") - len(optional)
    assert "None" not in line
    assert parse_line(line) == unknown


def test_values_that_earlier_versions_called_unknown_are_read_as_such():
    line = format_iteration(RECORD).replace("MFU: 41.7%", "MFU: n/a")
    assert parse_line(line) == replace(RECORD, mfu=None)


def test_a_loss_that_is_not_a_number_is_read_back():
    record = parse_line(format_iteration(replace(RECORD, loss=math.nan)))
    assert isinstance(record, IterationRecord)
    assert record.loss is not None
    assert math.isnan(record.loss)


def test_counts_wider_than_their_columns_are_read_back():
    wide = replace(RECORD, iteration=10**9, train_iterations=10**10, consumed_tokens=10**15, consumed_samples=10**14)
    assert parse_line(format_iteration(wide)) == wide


@pytest.mark.parametrize("part", ["validation", "test"])
def test_an_evaluation_survives_writing_and_reading(part):
    record = ValidationRecord(iteration=100, loss=2.5, part=part)
    line = format_validation(record)
    assert line == f" {part} loss at iteration 100 | lm loss value: 2.500000E+00 | lm loss PPL: 1.218249E+01 |"
    assert parse_line(line) == record


def test_losses_by_position_survive_writing_and_reading():
    buckets = (Bucket(0, 4096, 3.5), Bucket(4096, 8192, 2.25))
    record = PositionRecord(iteration=100, part="test", buckets=buckets)
    line = format_positions(record)
    assert line == " test loss by position at iteration 100 | 0-4096: 3.500000E+00 | 4096-8192: 2.250000E+00 |"
    assert parse_line(line) == record


def test_a_huge_loss_has_a_finite_perplexity():
    assert math.isfinite(ValidationRecord(iteration=1, loss=1e6).perplexity)


def test_whatever_a_launcher_puts_before_the_line_is_skipped():
    assert parse_line("[2031-01-01 10:00:00] worker-0: " + format_iteration(RECORD) + "\n") == RECORD


@pytest.mark.parametrize(
    "line",
    [
        "",
        "loading checkpoint at iteration 100",
        " iteration 3 in progress: 40% | forward layer 1 chunk 2 | elapsed: 0:10 | left: 0:20 |",
        format_iteration(RECORD)[:120],
        format_iteration(RECORD).replace("8.123456E+00", "8.12x"),
    ],
)
def test_other_and_damaged_lines_are_no_records(line):
    assert parse_line(line) is None


def test_a_log_gives_its_records_in_order():
    evaluation = ValidationRecord(iteration=1, loss=3.0)
    assert list(parse_log(["hello", format_iteration(RECORD), format_validation(evaluation)])) == [RECORD, evaluation]
