"""Chunks on disk in a training run: a log that says so, nothing left, and an error that ends all ranks."""

import re
from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import OFFLOADED, Ranks, base_flags, ranks, train

SMALL_DISK = REPOSITORY / "tests/integration/small_disk.py"
SIZES = ["--seq-length", "512", "--ds-sequence-parallel-fpdt-chunk-size", "128", *ranks(2, 1), "--train-iters", "2"]
SAVING = ["--ds-sequence-parallel-fpdt-recompute", "kv", "--ds-sequence-parallel-fpdt-checkpoint-interval", "1"]


@pytest.fixture
def flags(corpus: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "disk").mkdir()
    on_disk = ["--ds-sequence-parallel-fpdt-host-memory", "0.0007"]
    on_disk += ["--ds-sequence-parallel-fpdt-disk", str(tmp_path / "disk")]
    return [*base_flags(corpus), *OFFLOADED, *SIZES, *SAVING, "--micro-batch-size", "4", *on_disk]


def test_a_run_trains_through_the_disk_and_leaves_nothing_there(flags: list[str], tmp_path: Path) -> None:
    run = train(flags, tmp_path / "events", 2, script=SMALL_DISK)
    assert re.search(
        r"  disk rates +.* GB/s read, .* written, with all ranks at work; .* GiB may be used per rank\n", run.output
    )
    assert re.search(
        r"  host memory +0\.\d{3} GiB .* and 0\.\d{3} of staging memory\n.*  disk +0\.\d{3} GiB ", run.output
    )
    assert re.search(r"iteration +2/ +2 .* disk traffic \(GiB\): 0\.00 \| waiting for disk \(ms\): ", run.output)
    on_host = train(flags[:-4], tmp_path / "others", 2)
    assert run.losses == on_host.losses
    assert run.grad_norms == on_host.grad_norms
    assert not any((tmp_path / "disk").iterdir())


def test_a_disk_that_fails_on_one_rank_ends_all_with_one_error(flags: list[str], tmp_path: Path) -> None:
    with Ranks(flags, 2, script=SMALL_DISK, FAILING_RANK="1") as run:
        first, second = run.wait()
    assert [first.exit_code, second.exit_code] == [2, 2]
    assert "Traceback" not in first.stderr + second.stderr
    said = [
        "rank 1 (last in iteration 1",
        f"--ds-sequence-parallel-fpdt-disk ({tmp_path / 'disk'})",
        "EIO",
        "checkpoint",
    ]
    assert [word for word in said if word not in first.stderr] == []
    assert not any((tmp_path / "disk").iterdir())
