"""Arrays are cut where json cuts them, whatever the block size; a record too long is named and uses no memory."""

import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron.data import json_records
from megatron.data.errors import DataError
from megatron.data.json_records import TooLong, is_array, read_entries, read_lines
from megatron.data.packed_files import open_unpacked
from megatron.data.text_files import InputPosition, read_batches, read_documents

MIB = 1 << 20
AWKWARD = ['"', "\\", '\\"', "[", "]", "{", "}", ",", "a", "€", "\n", "", "]]", "\\\\"]


def random_value(source: random.Random, depth: int = 0) -> Any:
    kind = source.randrange(5 if depth < 3 else 3)
    if kind == 3:
        return [random_value(source, depth + 1) for _ in range(source.randrange(3))]
    if kind == 4:
        return {"".join(source.choices(AWKWARD, k=2)): random_value(source, depth + 1) for _ in range(3)}
    return source.choice([None, 1.5, True]) if kind == 0 else "".join(source.choices(AWKWARD, k=source.randrange(6)))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 16])
def test_the_entries_of_any_array_are_those_of_json(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_records, "BYTES_PER_READ", block)
    for seed in range(60):
        source = random.Random(seed)
        values = [random_value(source) for _ in range(source.randrange(5))]
        text = json.dumps(values, indent=source.choice([None, 2]), ensure_ascii=source.choice([True, False]))
        file = io.BytesIO(source.choice(["\ufeff", " \n", ""]).encode() + text.encode() + b"\n ")
        entries = list(read_entries(file, MIB, Path("a")))
        assert [json.loads(entry) for entry in entries if isinstance(entry, bytes)] == values


@pytest.mark.parametrize(
    "text, words",
    [
        ('[{"a": 1}, {"a": 2}', "a: a truncated JSON array"),
        ('[{"a": 1}, {"a": "]', "a: a truncated JSON array"),
        ("[", "a truncated JSON array"),
        ("[1, , 2]", "a, entry 2: empty"),
        ("[1, 2, ]", "a, entry 3: empty"),
        ("[,]", "a, entry 1: empty"),
        ("[1]\n[2]", "a: more text after the end of a JSON array"),
    ],
)
def test_an_array_that_is_not_whole_is_named(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words.replace("[", r"\[")):
        list(read_entries(io.BytesIO(text.encode()), MIB, Path("a")))


def test_a_file_that_is_one_array_gives_its_texts_from_any_entry_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{number}, [x]"} for number in range(9)], indent=4))
    assert is_array(path)
    for first in range(10):
        batches = read_batches([path], "auto", ["text"], InputPosition(0, first))
        texts = [batch.texts(index) for batch in batches for index in range(len(batch.records))]
        assert texts == [[f"{number}, [x]"] for number in range(first, 9)]


def test_an_entry_in_error_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": 3}, {"text": "c"}]')
    with pytest.raises(DataError, match=r"a\.json, entry 2: no text under the key 'text'"):
        list(read_documents([path], "jsonl", ["text"]))
    path.write_text('[{"text": "a"}, {"text" "b"}]')
    with pytest.raises(DataError, match=r"a\.json, entry 2: not JSON"):
        list(read_documents([path], "jsonl", ["text"]))


def test_a_record_at_the_limit_is_read_and_a_longer_one_is_marked() -> None:
    lines = [b"x" * 9 + b"\n", b"y" * 10 + b"\n", b"z" * 30 + b"\n", b"last"]
    assert list(read_lines(io.BytesIO(b"".join(lines)), 10)) == [lines[0], TooLong(10), TooLong(10), b"last"]
    entries = list(read_entries(io.BytesIO(b"[%s,%s,3]" % (b"1" * 10, b"2" * 11)), 10, Path("a")))
    assert entries == [b"1" * 10, TooLong(10), b"3"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt", "array.json"])
def test_a_document_that_is_too_long_is_named_whatever_it_comes_in(tmp_path: Path, name: str) -> None:
    path, texts = tmp_path / name, ["short", "x" * MIB, "after"]
    write(path, texts)
    unit, number = {"a.parquet": ("row", 2), "array.json": ("entry", 2)}.get(name, ("line", 2))
    where = str(path) if name == "a.txt" else f"{path}, {unit} {number}"
    input_format = "text" if name == "a.txt" else "auto"
    with pytest.raises(DataError) as caught:
        list(read_documents([path], input_format, ["text"], max_document_mb=1))
    assert str(caught.value).startswith(f"{where}: more than --max-document-mb (1) MiB; cut it")
    assert len(list(read_documents([path], input_format, ["text"], max_document_mb=4))) == (1 if name == "a.txt" else 3)


def write(path: Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": [text + "!" for text in texts]}), path)
    elif path.suffix == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(lines))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    else:
        path.write_bytes(json.dumps([{"text": text} for text in texts]).encode() if path.suffix == ".json" else lines)


def test_a_line_of_eight_gib_in_a_small_file_uses_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    frame = pytest.importorskip("zstandard").compress(b"a" * (64 * MIB))
    path.write_bytes(frame * 128)
    assert path.stat().st_size < MIB
    tracemalloc.start()
    batch = next(read_batches([path], "auto", ["text"], max_document_mb=1))
    with pytest.raises(DataError, match=r"a\.jsonl\.zst, line 1: more than --max-document-mb \(1\) MiB"):
        batch.texts(0)
    with open_unpacked(path) as file:
        assert sum(len(file.read(MIB)) for _ in range(512)) == 512 * MIB
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 * MIB
