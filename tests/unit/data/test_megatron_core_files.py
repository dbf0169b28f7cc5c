from pathlib import Path

import pytest

from megatron.data.indexed_dataset import IndexedDataset
from tests.unit.data.megatron_core_files import DOCUMENTS, FILES, contents, read_with_ours, write_with_ours


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_of_megatron_core_are_read(name: str) -> None:
    assert IndexedDataset(FILES / name).dtype.name == name
    assert read_with_ours(FILES / name) == DOCUMENTS[name]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_are_byte_for_byte_those_of_megatron_core(tmp_path: Path, name: str) -> None:
    write_with_ours(tmp_path / name, name)
    assert contents(tmp_path / name) == contents(FILES / name)


def test_the_documents_reach_the_limits_of_each_type() -> None:
    assert set(DOCUMENTS) == {"uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"}
    for documents in DOCUMENTS.values():
        assert any(len(document) > 1 for document in documents)
        assert [] in documents
        assert any([] in document for document in documents)
