from pathlib import Path

import numpy as np
import pytest

from megatron.data import indexed_dataset
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from tests.unit.tools.tool import run_tool

DOCUMENTS = [[[1, 2], [3]], [[]], [[4, 5, 6, 7, 8]]]


def write(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    prefix.parent.mkdir(exist_ok=True)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequences in documents:
            for sequence in sequences:
                writer.add_sequence(sequence)
            writer.end_document()
    return prefix


def content(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_merged_is_byte_for_byte_what_one_writer_writes(
    tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_dataset, "TOKENS_PER_COPY", 3)
    parts = [DOCUMENTS, [], DOCUMENTS[::-1]]
    names = [write(tmp_path / f"part{number}", part, dtype) for number, part in enumerate(parts)]
    assert run_tool("merge_datasets", "--input", *names, "--output-prefix", tmp_path / "new" / "all") == 0
    whole = [document for part in parts for document in part]
    assert content(tmp_path / "new" / "all") == content(write(tmp_path / "whole", whole, dtype))


def test_a_folder_stands_for_its_datasets_by_name(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        write(tmp_path / "parts" / f"{number}.part", [[[number]]])
    assert run_tool("merge_datasets", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "all") == 0
    merged = IndexedDataset(tmp_path / "all")
    assert [merged.get_document(number).tolist() for number in range(3)] == [[1], [2], [3]]


def test_bad_input_gives_one_line_and_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", DOCUMENTS, np.int32)
    (tmp_path / "empty").mkdir()
    for names, output, message in [
        ([a, b], "c", "b holds int32 and "),
        ([a], "a", "is among the datasets to merge; name another"),
        ([a, tmp_path / "nowhere"], "c", "nowhere.idx is missing"),
        ([tmp_path / "empty"], "c", "is a folder without .bin and .idx files"),
    ]:
        assert run_tool("merge_datasets", "--input", *names, "--output-prefix", tmp_path / output) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    Path(f"{b}.idx").unlink()
    assert run_tool("merge_datasets", "--input", tmp_path, "--output-prefix", tmp_path / "new" / "c") == 2
    assert "b.idx is missing" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx", "b.bin", "empty"}
