import numpy as np
import pytest

from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.data.vocabulary import CheckedTokens, check_document_ends, check_vocabulary
from tests.unit.data.conftest import MakeDataset


def test_a_dataset_within_the_vocabulary_is_read_whole(make_dataset: MakeDataset) -> None:
    assert check_vocabulary(IndexedDataset(make_dataset([6, 4])), 10) == 10


def test_an_empty_dataset_passes(make_dataset: MakeDataset) -> None:
    assert check_vocabulary(IndexedDataset(make_dataset([])), 10) == 0


@pytest.mark.parametrize("block_tokens", [2, 1000])
def test_the_first_token_outside_names_its_document(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, block_tokens: int
) -> None:
    monkeypatch.setattr("megatron.data.vocabulary.BLOCK_TOKENS", block_tokens)
    indexed = IndexedDataset(make_dataset([3, 0, 5, 4]))
    with pytest.raises(
        DataError, match=r"token id 6 in document 2 of .*data is outside the vocabulary, ids 0 to 5; use"
    ):
        check_vocabulary(indexed, 6)


def test_a_negative_token_is_refused(tmp_path: pytest.TempPathFactory) -> None:
    with IndexedDatasetWriter(f"{tmp_path}/data", np.int32) as writer:
        writer.add_document([1, -2])
    with pytest.raises(DataError, match="token id -2 in document 0"):
        check_vocabulary(IndexedDataset(f"{tmp_path}/data"), 6)


def test_a_large_dataset_is_read_at_its_start_its_end_and_in_between(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.data.vocabulary.BLOCK_TOKENS", 10)
    indexed = IndexedDataset(make_dataset([1000]))
    assert check_vocabulary(indexed, 1000, max_tokens=50) == 50
    with pytest.raises(DataError, match=r"token id 99[0-9] in document 0"):
        check_vocabulary(indexed, 990, max_tokens=50)


def test_documents_without_ends_are_reported(tmp_path: pytest.TempPathFactory) -> None:
    with IndexedDatasetWriter(f"{tmp_path}/data", np.int32) as writer:
        for document in ([1, 2], [3], [4, 5, 9], [9, 1]):
            writer.add_document(document)
    indexed = IndexedDataset(f"{tmp_path}/data")
    check_document_ends(indexed, 9)
    with pytest.raises(DataError, match=r"do not end with .* id \(7\).* --append-eod"):
        check_document_ends(indexed, 7)
    with pytest.raises(DataError, match="--append-eod"):
        check_document_ends(indexed, 9, num_documents=2)


def test_an_empty_dataset_has_no_ends_to_miss(make_dataset: MakeDataset) -> None:
    check_document_ends(IndexedDataset(make_dataset([])), 9)


def test_tokens_are_checked_where_they_are_read() -> None:
    tokens = CheckedTokens(np.array([1, 2, 9, 3]), vocab_size=4)
    assert len(tokens) == 4
    assert tokens[0:2].tolist() == [1, 2]
    with pytest.raises(DataError, match="token id 9 in the data is outside the vocabulary, ids 0 to 3"):
        tokens[1:4]
