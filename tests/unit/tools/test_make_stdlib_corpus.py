import json
from pathlib import Path

import pytest

from tests.unit.tools.tool import run_tool


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in (
        "a.py",
        "b.py",
        "pkg/c.py",
        "pkg/tests/d.py",
        "test/e.py",
        "site-packages/f.py",
        "idlelib/g.py",
        "h.txt",
    ):
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / "library" / "empty.py").write_text("")
    return tmp_path / "library"


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_source_that_is_not_a_test_is_a_document(library: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus.jsonl"
    assert run_tool("make_stdlib_corpus", "--source", library, "--output", output) == 0
    documents = {document["name"]: document["text"] for document in read(output)}
    assert documents == {name: f"# {name}\n" for name in ("a.py", "b.py", "pkg/c.py")}


def test_the_order_is_shuffled_and_always_the_same(tmp_path: Path) -> None:
    for k in range(30):
        (tmp_path / f"{k:02}.py").write_text("x = 1\n")
    outputs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for output in outputs:
        assert run_tool("make_stdlib_corpus", "--source", tmp_path, "--output", output) == 0
    names = [document["name"] for document in read(outputs[0])]
    assert names != sorted(names)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_the_size_limit_holds_for_the_running_standard_library(tmp_path: Path) -> None:
    output = tmp_path / "corpus.jsonl"
    assert run_tool("make_stdlib_corpus", "--max-bytes", 300_000, "--output", output) == 0
    total = sum(len(document["text"].encode()) for document in read(output))
    assert 0 < total <= 300_000


def test_a_folder_without_sources_gives_one_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("make_stdlib_corpus", "--source", tmp_path, "--output", tmp_path / "corpus.jsonl") == 2
    assert "no Python sources found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
