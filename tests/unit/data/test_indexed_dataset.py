import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data.errors import DataError
from megatron.data.index_file import DTYPE_OF_CODE
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, smallest_dtype
from tests.unit.data.conftest import MakeDataset

HEADER_BYTES = 34


def test_the_files_are_byte_for_byte_what_megatron_writes(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_sequence([1, 2, 3])
        writer.add_sequence([4])
        writer.end_document()
        writer.add_document([500, 6])

    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<3q", 0, 2, 3)
    assert (tmp_path / "data.idx").read_bytes() == expected
    assert (tmp_path / "data.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 500, 6)


@pytest.mark.parametrize("dtype", [choices[0] for choices in DTYPE_OF_CODE.values()])
def test_every_dtype_comes_back_as_written(tmp_path: Path, dtype: type[np.generic]) -> None:
    with IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
        writer.add_document(np.array([1, 2, 3], dtype=dtype))
        writer.add_document(np.array([100], dtype=dtype))
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.dtype == np.dtype(dtype)
    assert [dataset.get(k).tolist() for k in range(len(dataset))] == [[1, 2, 3], [100]]


@pytest.mark.parametrize("code, other", [(6, "<f4"), (7, "<f8")])
def test_a_float_code_on_which_forks_disagree_is_settled_by_the_size_of_the_bin(
    tmp_path: Path, code: int, other: str
) -> None:
    values = np.array([1, 2, 3], dtype=other)
    (tmp_path / "data.bin").write_bytes(values.tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 1, 2)
    (tmp_path / "data.idx").write_bytes(header + struct.pack("<iqqq", 3, 0, 0, 1))
    assert IndexedDataset(tmp_path / "data").get(0).tolist() == [1, 2, 3]


def test_a_part_of_a_sequence_and_of_a_document_is_read(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        writer.add_document([9])
        writer.add_sequence([10, 11, 12])
        writer.add_sequence([])
        writer.add_sequence([13, 14])
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.get(1, 1, 2).tolist() == [11, 12]
    assert dataset.get_document(1).tolist() == [10, 11, 12, 13, 14]
    assert dataset.get_document(1, 2, 2).tolist() == [12, 13]
    assert dataset.document_sizes.tolist() == [1, 5]
    with pytest.raises(IndexError, match="which has 3"):
        dataset.get(1, 2, 2)


def test_an_empty_dataset_opens_and_has_no_documents(make_dataset: MakeDataset) -> None:
    dataset = IndexedDataset(make_dataset([]))
    assert (dataset.num_documents, dataset.num_tokens) == (0, 0)


def test_pickling_carries_the_name_and_not_the_tokens(make_dataset: MakeDataset) -> None:
    dataset = IndexedDataset(make_dataset([100_000]))
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert pickle.loads(content).get(0, 5, 2).tolist() == [5, 6]


def test_a_failed_writer_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, make_dataset: MakeDataset) -> None:
    prefix = make_dataset([3])
    with pytest.raises(DataError), IndexedDatasetWriter(prefix, np.int32) as writer:
        writer.add_document([7, 7, 2**40])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]
    assert IndexedDataset(prefix).get(0).tolist() == [0, 1, 2]


def test_a_finished_writer_replaces_what_was_there(tmp_path: Path, make_dataset: MakeDataset) -> None:
    make_dataset([3])
    prefix = make_dataset([2], first=40)
    assert IndexedDataset(prefix).get(0).tolist() == [40, 41]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_a_token_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="token id 65536 does not fit uint16"),
        IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer,
    ):
        writer.add_document([65536])


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_file_is_named(make_dataset: MakeDataset, ending: str) -> None:
    prefix = make_dataset([3])
    Path(f"{prefix}.{ending}").unlink()
    with pytest.raises(DataError, match=rf"data\.{ending} is missing; .*preprocess_data"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("change", [-1, 1, "empty"])
def test_a_file_of_another_length_is_refused(make_dataset: MakeDataset, ending: str, change: int | str) -> None:
    prefix = make_dataset([3, 4])
    path = Path(f"{prefix}.{ending}")
    content = path.read_bytes()
    path.write_bytes(b"" if change == "empty" else content[:-1] if change == -1 else content + b"x")
    with pytest.raises(DataError, match=rf"data\.{ending} is .*; make the dataset again|is not a Megatron index"):
        IndexedDataset(prefix)


def test_a_multimodal_index_is_refused_as_such(make_dataset: MakeDataset) -> None:
    prefix = make_dataset([3, 4])
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes() + b"\0\1")
    with pytest.raises(DataError, match=r"data\.idx is of multimodal data"):
        IndexedDataset(prefix)


def test_every_truncation_of_the_index_is_refused(make_dataset: MakeDataset) -> None:
    prefix = make_dataset([3, 4])
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"data\.idx"):
            IndexedDataset(prefix)


@pytest.mark.parametrize(
    "position, replacement, message",
    [
        (0, b"GARBAGE", "is not a Megatron index"),
        (9, struct.pack("<Q", 2), "has index version 2; only 1"),
        (17, b"\x63", "has dtype code 99; allowed are 1 to 10"),
        (18, struct.pack("<Q", 2**40), "2 |truncated or corrupt"),
        (HEADER_BYTES, struct.pack("<i", -3), "sequence 0 has -3 tokens, expected 0 or more"),
        (HEADER_BYTES, struct.pack("<2i", 4, 3), "sequence 1 starts at byte 12, expected 16"),
        (HEADER_BYTES, struct.pack("<i", 5), r"data\.bin is truncated .*28 bytes, .* 9 tokens of int32, 36 bytes"),
        (HEADER_BYTES + 8, struct.pack("<q", 8), "sequence 0 starts at byte 8, expected 0"),
        (HEADER_BYTES + 24, struct.pack("<q", 1), "document indices run from 1 to 2, expected 0 to 2"),
        (HEADER_BYTES + 40, struct.pack("<q", 7), "document indices run from 0 to 7, expected 0 to 2"),
        (HEADER_BYTES + 32, struct.pack("<q", 9), "document indices go down"),
    ],
)
def test_a_corrupt_index_is_refused_with_what_is_wrong(
    make_dataset: MakeDataset, position: int, replacement: bytes, message: str
) -> None:
    prefix = make_dataset([3, 4])
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[position : position + len(replacement)] = replacement
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_checks_that_run_span_by_span_agree_with_one_span(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = make_dataset([3, 0, 4, 1, 5, 2, 6])
    monkeypatch.setattr("megatron.data.index_file.ENTRIES_PER_CHECK", 2)
    assert IndexedDataset(prefix).document_sizes.tolist() == [3, 0, 4, 1, 5, 2, 6]


def test_small_vocabularies_take_two_bytes_a_token() -> None:
    assert smallest_dtype(65_499) == np.uint16
    assert smallest_dtype(65_500) == np.int32
