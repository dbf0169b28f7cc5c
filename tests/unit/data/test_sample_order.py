from dataclasses import replace
from multiprocessing import Queue, get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pytest

from megatron.data.sample_order import OrderPlan, SampleOrder, build_order, cached_order, num_epochs_for

PLAN = OrderPlan(np.array([4, 9, 2, 7, 5], dtype=np.int64), range(1, 5), seq_length=3, seed=5, num_epochs=4)
GOLDEN = ([4, 2, 1, 3], [6, 0, 3, 1, 4, 2, 5])


def no_build(plan: OrderPlan) -> SampleOrder:
    raise AssertionError("built although it was cached")


def assert_equal(one: SampleOrder, other: SampleOrder) -> None:
    np.testing.assert_array_equal(one.document_index, other.document_index)
    np.testing.assert_array_equal(one.sample_index, other.sample_index)
    np.testing.assert_array_equal(one.shuffle_index, other.shuffle_index)


def test_every_epoch_reads_every_document_once_in_another_order() -> None:
    epochs = build_order(PLAN).document_index.reshape(4, 4)
    assert all(sorted(epoch) == [1, 2, 3, 4] for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_every_sample_is_drawn_once_and_within_its_epoch() -> None:
    shuffle_index = build_order(PLAN).shuffle_index
    for epoch in range(4):
        first, last = PLAN.num_samples_after(epoch), PLAN.num_samples_after(epoch + 1)
        assert sorted(shuffle_index[first:last].tolist()) == list(range(first, last))


def test_more_epochs_only_append() -> None:
    few, many = build_order(replace(PLAN, num_epochs=2)), build_order(PLAN)
    np.testing.assert_array_equal(few.document_index, many.document_index[: len(few.document_index)])
    np.testing.assert_array_equal(few.sample_index, many.sample_index[: len(few.sample_index)])
    np.testing.assert_array_equal(few.shuffle_index, many.shuffle_index[: len(few.shuffle_index)])


def test_the_order_of_a_seed_never_changes() -> None:
    """Checkpoints store their position in this order as a count of samples."""
    order = build_order(replace(PLAN, num_epochs=1))
    assert (order.document_index.tolist(), order.shuffle_index.tolist()) == GOLDEN


@pytest.mark.parametrize("num_samples", range(1, 40))
def test_the_number_of_epochs_is_the_least_that_holds_the_samples(num_samples: int) -> None:
    num_epochs = num_epochs_for(num_samples, PLAN.tokens_per_epoch, PLAN.seq_length)
    assert PLAN.num_samples_after(num_epochs - 1) < num_samples <= PLAN.num_samples_after(num_epochs)


def test_a_cached_order_is_loaded_and_not_rebuilt(tmp_path: Path) -> None:
    first = cached_order(PLAN, tmp_path / "cache")
    assert_equal(first, build_order(PLAN))
    assert_equal(cached_order(PLAN, tmp_path / "cache", no_build), first)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


def one_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def assert_built_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rebuild it once, with a warning that names the file."""
    caplog.clear()
    assert_equal(cached_order(PLAN, folder), build_order(PLAN))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{one_file(folder)} is cut short or was changed" in caplog.text
    assert_equal(cached_order(PLAN, folder, no_build), build_order(PLAN))
    assert len(caplog.records) == 1


def test_a_truncated_cache_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached_order(PLAN, tmp_path)
    whole = one_file(tmp_path).read_bytes()
    for keep_bytes in [*range(0, len(whole), 25), len(whole) - 8, len(whole) - 4, len(whole) - 1]:
        one_file(tmp_path).write_bytes(whole[:keep_bytes])
        assert_built_again(tmp_path, caplog)


def test_a_cache_with_a_flipped_bit_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached_order(PLAN, tmp_path)
    whole = one_file(tmp_path).read_bytes()
    for place in [*range(0, len(whole), 7), *range(len(whole) - 4, len(whole))]:
        one_file(tmp_path).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert_built_again(tmp_path, caplog)


def test_a_cache_with_a_hole_or_more_bytes_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached_order(PLAN, tmp_path)
    whole = one_file(tmp_path).read_bytes()
    for damaged in (bytes(len(whole)), whole[:200] + bytes(len(whole) - 200), whole + bytes(4), whole + whole):
        one_file(tmp_path).write_bytes(damaged)
        assert_built_again(tmp_path, caplog)


def test_a_whole_cache_of_another_plan_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached_order(PLAN, tmp_path / "one")
    cached_order(replace(PLAN, seed=6), tmp_path / "other")
    one_file(tmp_path / "one").write_bytes(one_file(tmp_path / "other").read_bytes())
    assert_built_again(tmp_path / "one", caplog)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"seq_length": 4},
        {"num_epochs": 5},
        {"documents": range(0, 5)},
        {"document_sizes": np.array([4, 9, 2, 5, 7], dtype=np.int64)},
    ],
)
def test_anything_that_changes_the_order_changes_the_name_of_its_cache(change: dict[str, object]) -> None:
    assert replace(PLAN, **change).fingerprint() != PLAN.fingerprint()  # type: ignore[arg-type]


def test_sizes_outside_the_documents_do_not_change_the_name() -> None:
    sizes = np.array([400, 9, 2, 7, 5], dtype=np.int64)
    assert replace(PLAN, document_sizes=sizes).fingerprint() == PLAN.fingerprint()


def order_of_a_job(cache_dir: str, barrier: Barrier, results: Queue) -> None:
    barrier.wait()
    order = cached_order(PLAN, Path(cache_dir))
    results.put((order.document_index.tolist(), order.shuffle_index.tolist()))


def test_jobs_that_start_at_once_share_one_whole_cache(tmp_path: Path) -> None:
    context = get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    jobs = [context.Process(target=order_of_a_job, args=(str(tmp_path / "cache"), barrier, results)) for _ in range(4)]
    for job in jobs:
        job.start()
    orders = [results.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    expected = build_order(PLAN)
    assert orders == [(expected.document_index.tolist(), expected.shuffle_index.tolist())] * 4
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]
    assert_equal(cached_order(PLAN, tmp_path / "cache", no_build), expected)


def test_a_job_that_fails_while_it_writes_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_of_it(file: BinaryIO, array: npt.NDArray[np.int64]) -> None:
        file.write(array.tobytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", half_of_it)
    with pytest.raises(OSError, match="No space left"):
        cached_order(PLAN, tmp_path)
    assert list(tmp_path.iterdir()) == []
