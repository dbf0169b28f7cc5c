import io
from dataclasses import replace

import pytest

from megatron.logging.compact_line import format_compact, line_formatter
from megatron.logging.log_line import format_iteration
from tests.unit.logging.reported_runs import RECORD

COLUMNS = 120


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_what_one_watches():
    record = replace(
        RECORD, iteration=7, train_iterations=100, loss=2.34561, grad_norm=1.2341, learning_rate=1.2e-4,
        tokens_per_second_per_gpu=301.1, mfu=0.516, milliseconds=1_741_000.0, peak_gpu_gib=101.44, hours_left=44.97,
    )  # fmt: skip
    assert format_compact(record) == (
        " step   7/100  loss 2.3456  norm 1.234  lr 1.20e-04  301 tok/s/GPU  MFU 51.6%  29:01  101.4 GiB  ETA 1d 21h"
    )


def test_a_long_line_fits_a_terminal():
    record = replace(
        RECORD, iteration=114_440, train_iterations=114_440, loss=12.34561, grad_norm=123.41, learning_rate=1.2e-4,
        tokens_per_second_per_gpu=53_108.6, mfu=0.516, milliseconds=12_340.0, peak_gpu_gib=101.44, hours_left=447.0,
    )  # fmt: skip
    assert len(format_compact(record)) <= COLUMNS


@pytest.mark.parametrize(
    "values, part",
    [
        ({"loss": None}, "  no loss  "),
        ({"mfu": None}, "  1.00 TFLOP/s  "),
        ({"peak_gpu_gib": None}, "  9.0 GiB  "),
        ({"milliseconds": 89.04}, "  89 ms  "),
        ({"milliseconds": 3560.0}, "  3.56 s  "),
        ({"grad_norm": 123456.0}, "  norm 1.23e+05  "),
        ({"skipped_iterations": 3}, "  skipped 3  "),
        ({"nan_iterations": 2}, "  nan 2  "),
        ({"expert_imbalance": 3.5}, "  imbalance 3.50  "),
    ],
)
def test_a_line_says_what_is_unusual_and_never_that_a_value_is_unknown(values, part):
    line = format_compact(replace(RECORD, hours_left=0.5, **values))
    assert part in line
    assert line.endswith("  ETA 30:00")


@pytest.mark.parametrize(
    "log_format, stream, form",
    [
        ("auto", Terminal(), format_compact),
        ("auto", io.StringIO(), format_iteration),
        ("compact", io.StringIO(), format_compact),
        ("megatron", Terminal(), format_iteration),
    ],
)
def test_the_flag_and_the_terminal_decide(log_format, stream, form):
    assert line_formatter(log_format, stream) is form
