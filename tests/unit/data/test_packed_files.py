import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.data.errors import DataError
from megatron.data.packed_files import open_unpacked, require
from megatron.data.text_files import read_documents

CONTENT = b"".join(b"%d a line of some length\n" % number for number in range(20_000))


def zstd(content: bytes) -> bytes:
    compressed: bytes = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)
    return compressed


PACKED: list[tuple[str, Callable[[bytes], bytes]]] = [("a.gz", gzip.compress), ("a.zst", zstd)]


def read(path: Path) -> bytes:
    with open_unpacked(path) as file:
        return b"".join(file)


@pytest.mark.parametrize("name, pack", PACKED)
def test_files_of_one_and_of_several_parts_are_unpacked(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(pack(CONTENT) + pack(b"") + pack(b"end\n"))
    assert read(path) == CONTENT + b"end\n"


@pytest.mark.parametrize("name, pack", PACKED)
@pytest.mark.parametrize("cut", [1, 9, 500])
def test_a_truncated_packed_file_is_named(tmp_path: Path, name: str, pack: Callable[[bytes], bytes], cut: int) -> None:
    path = tmp_path / name
    path.write_bytes(pack(CONTENT)[:-cut])
    with pytest.raises(DataError, match=rf"{name} cannot be read: .*; give a whole, readable file"):
        read(path)


@pytest.mark.parametrize("name, pack", PACKED)
def test_a_packed_file_followed_by_other_bytes_is_named(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(pack(CONTENT) + b"and more")
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        read(path)


def test_a_damaged_stream_in_a_gzip_file_is_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(CONTENT))
    content[10] ^= 0xFF  # a type of block that there is not: zlib's own error
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.gz cannot be read"):
        read(tmp_path / "a.gz")


@pytest.mark.parametrize("has_checksum", [True, False])
def test_one_file_without_checksums_is_named_once(
    tmp_path: Path, has_checksum: bool, caplog: pytest.LogCaptureFixture
) -> None:
    zstandard = pytest.importorskip("zstandard")
    for name in ("a.zst", "b.zst"):
        content = zstandard.ZstdCompressor(write_checksum=has_checksum).compress(b'{"text": "a"}\n')
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / "a.zst", tmp_path / "b.zst"]
    assert len(list(read_documents(paths, "jsonl", ["text"]))) == 2
    expected = [f"{paths[0]} has no checksums, so that damage to it cannot be seen; no other file is named"]
    assert [record.getMessage() for record in caplog.records] == ([] if has_checksum else expected)


@pytest.mark.parametrize("name, pack", PACKED)
def test_a_bit_changed_anywhere_in_a_file_with_checksums_gives_no_other_text(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    path, content = tmp_path / name, CONTENT[:2000]
    whole = pack(content)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            assert read(path) == content, f"byte {place}"
        except DataError:
            continue


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.zst, a Zstandard file, needs the package zstandard.*`pip install zstan"):
        read(tmp_path / "a.zst")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"x needs the package pyarrow, which is missing; run `pip install pyarrow`"):
        require("pyarrow.parquet", "x")
