import gzip
from pathlib import Path

import pytest

from megatron.data.errors import DataError
from megatron.data.text_files import find_inputs, read_documents, read_source


def test_json_lines_plain_and_gzipped_give_their_texts(tmp_path: Path) -> None:
    content = '{"text": "one", "title": "x"}\n\n{"text": "zwei €"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    documents = list(read_documents(find_inputs([str(tmp_path)], "jsonl"), "jsonl", ["text"]))
    assert [texts for texts, _ in documents] == [["one"], ["zwei €"]] * 2


def test_text_files_are_documents_found_by_folder_or_pattern(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    (tmp_path / "sub" / "a.txt").write_text("first\nline")
    expected = [(["second"], 9), (["first\nline"], 10)]
    for name in (tmp_path, tmp_path / "**" / "*.txt"):
        assert list(read_documents(find_inputs([str(name)], "text"), "text", ["text"])) == expected


def test_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--input \(.*nothing\*\) stands for no jsonl file"):
        find_inputs([str(tmp_path / "nothing*")], "jsonl")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n["a"]\n', r"line 2: a JSON list; every record must be an object"),
        (b'{"body": "a"}\n', r"line 1: no text under the key 'text'; keys found: body; name one by --json-keys"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", r"line 1: not JSON \(brackets are nested too deep\)"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", r"line 1: not JSON \(Exceeds the limit"),
        (b'{"text": 3}\n', r"line 1: no text under the key 'text'"),
        (b'{"text": "\xff"}\n', r"line 1: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path / "a.jsonl"], "jsonl", ["text"]))


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        list(read_documents([path], "jsonl", ["text"]))


def test_sources_are_read_in_the_encoding_they_declare(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (tmp_path / "broken.py").write_bytes(b"# \xe9\n")
    assert read_source(tmp_path / "latin.py") == "# coding: latin-1\n# é\n"
    assert read_source(tmp_path / "broken.py") is None
