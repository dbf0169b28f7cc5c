import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron.core.sequence_layout import SequenceLayout
from megatron.data.batch import EndOfDocument, slice_batch
from megatron.data.errors import DataError
from megatron.data.gpt_dataset import GPTDataset, SampleSettings, build_dataset, build_datasets
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.data.sample_order import OrderPlan, SampleOrder, build_order
from tests.unit.data.conftest import MakeDataset

SIZES = [5, 0, 17, 3, 8, 1, 30, 11, 2, 23]


def open_part(prefix: str, num_samples: int, seq_length: int = 7, seed: int = 1, **options: object) -> GPTDataset:
    indexed = IndexedDataset(prefix)
    documents = range(indexed.num_documents)
    settings = SampleSettings(seq_length, seed, **options)  # type: ignore[arg-type]
    return GPTDataset(indexed, documents, num_samples, "train", settings)


def tokens_in_order(prefix: str, num_epochs: int, seq_length: int = 7, seed: int = 1) -> tuple[np.ndarray, SampleOrder]:
    """Return the concatenated documents in reading order, and that order."""
    indexed = IndexedDataset(prefix)
    order = build_order(OrderPlan(indexed.document_sizes, range(indexed.num_documents), seq_length, seed, num_epochs))
    return np.concatenate([indexed.get_document(document) for document in order.document_index.tolist()]), order


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.uint8, np.int64])
def test_every_slice_of_a_sample_is_what_the_documents_hold_there(make_dataset: MakeDataset, dtype: type) -> None:
    prefix = make_dataset(SIZES, dtype=dtype)
    dataset = open_part(prefix, 40)
    tokens, order = tokens_in_order(prefix, num_epochs=3)
    for k in range(40):
        first = 7 * int(order.shuffle_index[k])
        assert len(dataset[k]) == 8
        assert dataset[k][:].dtype == dtype
        for start in range(9):
            for stop in range(start, 9):
                np.testing.assert_array_equal(dataset[k][start:stop], tokens[first + start : first + stop])


def test_a_slice_reads_no_token_but_its_own(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_part(make_dataset(SIZES), 20, seq_length=40)
    whole = [dataset[k][:] for k in range(20)]
    read: list[int] = []

    def get_tokens(indexed: IndexedDataset, start: int, stop: int) -> np.ndarray:
        read.extend(range(start, stop))
        return np.arange(start, stop)  # as the tokens of make_dataset are

    monkeypatch.setattr(IndexedDataset, "get_tokens", get_tokens)
    for k in range(20):
        read.clear()
        sample = dataset[k]
        assert read == []
        sample[13:29]
        assert read == whole[k][13:29].tolist()


def test_a_sample_has_no_steps(make_dataset: MakeDataset) -> None:
    with pytest.raises(IndexError, match="a step of 2 is not possible"):
        open_part(make_dataset(SIZES), 1)[0][::2]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
@pytest.mark.parametrize("flags", [{}, {"reset_position_ids": True, "eod_mask_loss": True}])
def test_a_batch_of_two_million_tokens_uses_no_memory_but_its_own(
    tmp_path: Path, dtype: type, flags: dict[str, bool]
) -> None:
    length, end, rank = 2**21, 77, 1
    with IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
        for _ in range(length // 5000 + 1):
            writer.add_document(np.arange(5000))
    dataset = open_part(str(tmp_path / "data"), 1, length, vocab_size=5000)
    end_of_document, layout = EndOfDocument(end, **flags), SequenceLayout(length, 2**17, 4)
    tracemalloc.start()  # sees numpy's arrays, and not torch's tensors, which the batch consists of
    batch = slice_batch([end_of_document.sample(dataset[0])], layout, rank, pin=False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole, owned = dataset[0][:].astype(np.int64), layout.owned_positions(rank).numpy()
    np.testing.assert_array_equal(batch.tokens[0], whole[owned])
    np.testing.assert_array_equal(batch.labels[0], whole[owned + 1])
    assert int(batch.loss_mask.sum()) == layout.local_length - (whole[owned] == end).sum() * bool(flags)
    assert most < 4 * 2**20 < sum(part.nbytes for part in (batch.tokens, batch.labels))


def test_every_token_is_a_label_once_per_epoch(make_dataset: MakeDataset) -> None:
    dataset = open_part(make_dataset(SIZES), 99, seq_length=1)
    labels = np.sort(np.concatenate([dataset[k][1:] for k in range(99)]))
    assert len(np.unique(labels)) == 99  # 100 tokens, the first of which nothing comes before


def test_a_second_epoch_reads_every_token_again_in_another_order(make_dataset: MakeDataset) -> None:
    dataset = open_part(make_dataset(SIZES), 199, seq_length=1)
    labels = [int(dataset[k][1:2][0]) for k in range(199)]
    first, second = labels[:99], labels[99:]
    assert sorted(second) == list(range(100))
    assert first != second[:99]


def test_samples_are_shuffled_and_another_seed_gives_another_order(make_dataset: MakeDataset) -> None:
    prefix = make_dataset(SIZES)
    orders = [
        [dataset[k][:].tolist() for k in range(14)] for dataset in (open_part(prefix, 14, seed=s) for s in (1, 1, 2))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_asking_for_more_samples_leaves_the_first_ones_as_they_were(make_dataset: MakeDataset) -> None:
    prefix = make_dataset(SIZES)
    few, many = open_part(prefix, 20), open_part(prefix, 200)
    for k in range(20):
        np.testing.assert_array_equal(few[k][:], many[k][:])


def test_negative_and_64_bit_seeds_work(make_dataset: MakeDataset) -> None:
    prefix = make_dataset(SIZES)
    assert open_part(prefix, 5, seed=-1)[0][:].shape == open_part(prefix, 5, seed=2**63)[0][:].shape == (8,)


def test_exactly_one_sample_of_tokens_is_enough_and_one_fewer_is_refused(make_dataset: MakeDataset) -> None:
    assert sorted(open_part(make_dataset([3, 5]), 4)[3][:].tolist()) == list(range(8))
    message = r"train part of .*data has 7 tokens in 2 documents; one sample takes 8 \(--seq-length 7"
    with pytest.raises(DataError, match=message):
        open_part(make_dataset([3, 4]), 1)


def test_values_that_are_not_integers_are_refused(make_dataset: MakeDataset) -> None:
    with pytest.raises(DataError, match="holds float32 values, not token ids"):
        open_part(make_dataset([30], dtype=np.float32), 1)


def test_a_token_beyond_the_vocabulary_is_refused_when_its_sample_is_read(make_dataset: MakeDataset) -> None:
    dataset = open_part(make_dataset([8]), 1, vocab_size=7)
    assert dataset[0][:7].tolist() == list(range(7))
    with pytest.raises(DataError, match=r"token id 7 in sample 0 of the train part of .*ids 0 to 6"):
        dataset[0][7:8]


def test_an_index_outside_the_dataset_is_an_error(make_dataset: MakeDataset) -> None:
    dataset = open_part(make_dataset(SIZES), 3)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[index]


def test_parts_share_no_document_and_an_unused_part_is_none(make_dataset: MakeDataset) -> None:
    prefix = make_dataset([10] * 20)
    train, valid, test = build_datasets([prefix], "80,20", (30, 8, 0), SampleSettings(9, 1))
    assert train is not None
    assert valid is not None
    assert test is None
    assert max(train[k][:].max() for k in range(30)) < 160 <= min(valid[k][:].min() for k in range(8))


def test_a_part_without_enough_tokens_names_itself(make_dataset: MakeDataset) -> None:
    with pytest.raises(DataError, match=r"the valid part of .* has 10 tokens in 1 documents; .* change --split"):
        build_datasets([make_dataset([10] * 20)], "95,5,0", (3, 1, 0), SampleSettings(19, 1))


def test_a_validation_part_without_documents_is_none_and_a_training_part_is_an_error(make_dataset: MakeDataset) -> None:
    prefix = make_dataset([10] * 20)
    train, valid, test = build_datasets([prefix], "1,0,0", (3, 1, 1), SampleSettings(9, 1))
    assert train is not None
    assert valid is None
    assert test is None
    with pytest.raises(DataError, match=r"the train part of .* has 0 tokens in 0 documents; .* change --split"):
        build_datasets([prefix], "0,1,0", (3, 1, 0), SampleSettings(9, 1))


def test_no_order_is_cached_if_a_later_part_is_refused(make_dataset: MakeDataset) -> None:
    prefix = make_dataset([10] * 20)
    with pytest.raises(DataError, match="the valid part"):
        build_datasets([prefix], "95,5,0", (3, 1, 0), SampleSettings(19, 1))
    assert not Path(f"{prefix}_cache").exists()


def test_a_blend_draws_from_each_dataset_by_weight(make_dataset: MakeDataset) -> None:
    small, large = make_dataset([50] * 4, "small"), make_dataset([50] * 4, "large", first=1000)
    blend, _, _ = build_datasets(["1", small, "3", large], "1", (400, 0, 0), SampleSettings(9, 1))
    assert blend is not None
    assert len(blend) == 400
    from_large = sum(int(blend[k][:1][0] >= 1000) for k in range(400))
    assert abs(from_large - 300) <= 1


def test_a_blend_takes_the_samples_of_each_dataset_in_its_own_order(make_dataset: MakeDataset) -> None:
    prefixes = [make_dataset(SIZES, f"source{k}", first=1000 * k) for k in range(3)]
    blend, _, _ = build_datasets(
        ["2", prefixes[0], "1", prefixes[1], "5", prefixes[2]], "1", (80, 0, 0), SampleSettings(7, 1)
    )
    assert blend is not None
    drawn: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for k in range(80):
        drawn[int(blend[k][:1][0]) // 1000].append(blend[k][:].tolist())
    assert {source: len(samples) for source, samples in drawn.items()} == {0: 20, 1: 10, 2: 50}
    for source, samples in drawn.items():
        alone = open_part(prefixes[source], len(samples))
        assert samples == [alone[k][:].tolist() for k in range(len(samples))]


def test_a_blend_is_the_same_every_time_and_a_longer_one_begins_with_it(make_dataset: MakeDataset) -> None:
    paths = ["0.3", make_dataset(SIZES, "one"), "0.7", make_dataset(SIZES, "two", first=1000)]
    first, again, longer = (build_datasets(paths, "1", (n, 0, 0), SampleSettings(7, 1))[0] for n in (30, 30, 200))
    assert first is not None
    assert again is not None
    assert longer is not None
    for k in range(30):
        assert first[k][:].tolist() == again[k][:].tolist() == longer[k][:].tolist()


def test_a_dataset_too_light_to_be_drawn_is_not_needed(make_dataset: MakeDataset) -> None:
    tiny = make_dataset([1], "tiny")
    blend, _, _ = build_datasets(
        ["0.001", tiny, "0.999", make_dataset([50] * 4, "large")], "1", (10, 0, 0), SampleSettings(9, 1)
    )
    assert blend is not None
    assert len(blend[9]) == 10


def test_a_part_with_files_of_its_own_uses_all_their_documents(make_dataset: MakeDataset) -> None:
    dataset = build_dataset([make_dataset([10])], "valid", 1, SampleSettings(9, 1))
    assert dataset is not None
    assert dataset[0][:].tolist() == list(range(10))


def test_the_order_is_cached_next_to_the_data_by_default(make_dataset: MakeDataset) -> None:
    prefix = make_dataset(SIZES)
    build_datasets([prefix], "1", (20, 0, 0), SampleSettings(7, 1))
    assert len(list(Path(f"{prefix}_cache").glob("*.npy"))) == 1


def test_data_in_a_folder_that_cannot_be_written_works_without_a_cache(make_dataset: MakeDataset) -> None:
    prefix = make_dataset(SIZES)
    Path(f"{prefix}_cache").write_text("a file where the folder would be, which stops even root")
    train, _, _ = build_datasets([prefix], "1", (20, 0, 0), SampleSettings(7, 1))
    assert train is not None
    assert train[19][:].shape == (8,)


def test_a_cache_folder_that_was_asked_for_must_work(make_dataset: MakeDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--data-cache-path \(.*file/cache\) cannot be used"):
        build_datasets([make_dataset(SIZES)], "1", (20, 0, 0), SampleSettings(7, 1, tmp_path / "file" / "cache"))
