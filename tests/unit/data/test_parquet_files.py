from pathlib import Path
from typing import Any

import pytest

from megatron.data.errors import DataError
from megatron.data.parquet_files import has_checksums, read_rows
from megatron.data.text_files import read_documents

arrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"text {number} €" for number in range(5000)]


def write(path: Path, columns: dict[str, Any], row_group_size: int = 1300) -> Path:
    parquet.write_table(arrow.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
@pytest.mark.parametrize("skip", [0, 1, 1299, 1300, 2650, 4999, 5000])
def test_rows_come_in_order_from_any_of_them_on(tmp_path: Path, kind: str, skip: int) -> None:
    of_kind = {"string": arrow.string(), "large_string": arrow.large_string()}.get(kind)
    column = arrow.array(TEXTS, of_kind) if of_kind else arrow.array(TEXTS).dictionary_encode()
    path = write(tmp_path / "a.parquet", {"title": TEXTS[::-1], "text": column})
    rows = read_rows(path, ["text", "title"], skip)
    assert list(rows) == [(a.encode(), b.encode()) for a, b in zip(TEXTS, TEXTS[::-1], strict=True)][skip:]


def test_a_missing_column_and_one_that_is_not_text_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"body": ["a"], "number": [1]})
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; columns found: body, number; name one by"):
        list(read_rows(path, ["text"]))
    with pytest.raises(DataError, match=r"a\.parquet: column 'number' is of type int64, not text"):
        list(read_rows(path, ["number"]))


def test_a_row_without_text_and_one_that_is_not_utf_8_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a", None]})
    with pytest.raises(DataError, match=r"a\.parquet, row 2: no text in the column 'text'; repair it, or leave such"):
        list(read_documents([path], "auto", ["text"]))
    invalid = arrow.StringArray.from_buffers(1, arrow.py_buffer(b"\0\0\0\0\1\0\0\0"), arrow.py_buffer(b"\xff"))
    path = write(tmp_path / "b.parquet", {"text": invalid})
    with pytest.raises(DataError, match=r"b\.parquet, row 1: not UTF-8"):
        list(read_documents([path], "auto", ["text"]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dictionary": False, "compression": "none"},
        {"data_page_version": "2.0", "compression": "zstd"},
    ],
    ids=["usual", "plain", "version 2"],
)
def test_a_bit_changed_anywhere_in_a_file_with_checksums_gives_no_other_text(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path, texts = tmp_path / "a.parquet", TEXTS[:40]
    table = arrow.table({"text": texts, "number": range(len(texts))})
    parquet.write_table(table, path, row_group_size=17, write_page_checksum=True, **settings)
    assert has_checksums(path, ["text"])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            rows = list(read_rows(path, ["text"]))
        except DataError:
            continue
        assert rows == [(text.encode(),) for text in texts], f"byte {place}"


def test_rows_that_the_footer_leaves_out_are_missed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": TEXTS[:40]}, row_group_size=25)
    whole = path.read_bytes()
    # Field 3 of the row group, its rows, behind field 2, its bytes: 25 and 15 in zigzag form.
    path.write_bytes(whole.replace(b"\x16\x32", b"\x16\x22"))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: it says 40 rows, and its row groups 32"):
        list(read_rows(path, ["text"]))


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
def test_whether_pages_have_checksums_is_seen(tmp_path: Path, checksums: bool, dictionary: bool) -> None:
    path = tmp_path / "a.parquet"
    table = arrow.table({"number": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, path, write_page_checksum=checksums, use_dictionary=dictionary)
    assert has_checksums(path, ["text"]) == checksums


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet file at all"])
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: .*; give a whole, readable file"):
        list(read_rows(tmp_path / "a.parquet", ["text"]))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": TEXTS})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        list(read_rows(path, ["text"]))


def test_a_file_whose_columns_have_unreadable_names_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a"], "other": ["b"]})
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xff\xff"))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        list(read_rows(path, ["text"]))
