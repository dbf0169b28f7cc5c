"""A save that fails ends every rank with one line, and the checkpoints before it stand."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import OFFLOADED, SCRIPT, Ended, Ranks, base_flags, ranks, train
from tests.integration.test_bad_input import assert_one_clear_line

SMALL_FILES = REPOSITORY / "tests/integration/small_files.py"
SPREAD = [*OFFLOADED, *ranks(2, 3)]
PAGE_BYTES = 4096
FREE_BYTES = 100_000  # less than a checkpoint takes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of its own, of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def state_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def go_on(corpus: Path, saved: Path, script: Path = SCRIPT) -> list[Ended]:
    """Train two steps further, saving after each."""
    common = [*base_flags(corpus), *SPREAD, "--train-iters", "4", "--save-interval", "1"]
    with Ranks([*common, "--save", str(saved), "--load", str(saved)], 2, script=script) as run:
        return run.wait()


def first_part(corpus: Path, saved: Path, events: Path) -> None:
    train([*base_flags(corpus), *SPREAD, "--train-iters", "2", "--save", str(saved)], events, 2)


def assert_all_ranks_ended(ended: list[Ended], words: list[str]) -> None:
    assert_one_clear_line(ended[0], words)
    assert [rank.exit_code for rank in ended] == [2, 2]


def test_a_rank_that_cannot_write_ends_all_and_the_checkpoint_before_stands(corpus: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    first_part(corpus, saved, tmp_path / "events")
    before = state_of(saved)
    ended = go_on(corpus, saved, SMALL_FILES)
    assert_all_ranks_ended(ended, ["global_step3 cannot be saved: File too large", f"--load {saved}"])
    assert state_of(saved) == before
    assert [rank.exit_code for rank in go_on(corpus, saved)] == [0, 0]
    assert (saved / "latest").read_text() == "global_step4"


def test_a_full_disk_ends_all_and_the_checkpoint_before_stands(corpus: Path, tmp_path: Path, disk: Path) -> None:
    saved = disk / "saved"
    first_part(corpus, saved, tmp_path / "events")
    before = state_of(saved)
    with (disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(shutil.disk_usage(disk).free - FREE_BYTES))
    ended = go_on(corpus, saved)
    assert_all_ranks_ended(ended, ["global_step3 cannot be saved: No space left on device", f"--load {saved}"])
    assert state_of(saved) == before


def test_metrics_and_timeline_on_a_full_disk_do_not_end_the_training(corpus: Path, disk: Path) -> None:
    with (disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(shutil.disk_usage(disk).free - PAGE_BYTES))  # the event file takes the last page
    profile = ["--profile", "--profile-step-start", "1", "--profile-step-end", "2", "--tensorboard-dir", str(disk)]
    with Ranks([*base_flags(corpus), *profile, "--train-iters", "20", "--log-interval", "1"]) as run:
        (ended,) = run.wait()
    assert ended.exit_code == 0
    lines = [line for line in ended.stdout.splitlines() if "No space left on device" in line]
    reporters = [line.partition(" cannot ")[0] for line in lines]
    assert sorted(reporters) == ["WARNING: --profile", "WARNING: TensorBoardWriter"]
    assert "iteration       20/" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_disk_that_cannot_be_written_is_seen_before_the_training(corpus: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = go_on(corpus, disk / "saved")
    assert_all_ranks_ended(ended, [f"--save ({disk / 'saved'})", "cannot be written; name a folder"])
