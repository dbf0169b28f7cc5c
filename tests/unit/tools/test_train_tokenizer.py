import json
from pathlib import Path

import pytest

from megatron.tokenizer import build_tokenizer
from tests.unit.tokenizer.conftest import HARD_TEXTS
from tests.unit.tools.tool import run_tool


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = ["the cat sat on the mat\n", "the dog saw the cat <|endoftext|>", "naïve café 漢字", "odd \ud800"]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    return path


def test_the_files_serve_as_a_gpt2_tokenizer_and_lose_no_text(tmp_path: Path, corpus: Path) -> None:
    arguments = ("--input", corpus, "--vocab-size", 280, "--output-dir", tmp_path / "tokenizer")
    assert run_tool("train_tokenizer", *arguments) == 0
    vocab_file, merge_file = tmp_path / "tokenizer" / "vocab.json", tmp_path / "tokenizer" / "merges.txt"
    tokenizer = build_tokenizer("GPT2BPETokenizer", str(vocab_file), str(merge_file))
    assert (tokenizer.vocab_size, tokenizer.eod) == (280, 279)
    assert len(merge_file.read_text(encoding="utf-8").splitlines()) == 1 + 280 - 257
    assert len(tokenizer.tokenize("the cat")) == 2
    for text in HARD_TEXTS:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path, corpus: Path) -> None:
    for name in ("one", "two"):
        assert run_tool("train_tokenizer", "--input", corpus, "--vocab-size", 300, "--output-dir", tmp_path / name) == 0
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_vocabulary_too_small_for_the_bytes_is_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_tool("train_tokenizer", "--input", corpus, "--vocab-size", 256, "--output-dir", tmp_path)
    assert exit_.value.code == 2
    assert "--vocab-size (256) must be 257 or more" in capsys.readouterr().err


def test_a_short_text_gives_a_smaller_vocabulary_and_says_so(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("train_tokenizer", "--input", corpus, "--vocab-size", 5000, "--output-dir", tmp_path) == 0
    assert "no pairs left to merge" in capsys.readouterr().err


def test_missing_input_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--input", tmp_path / "nowhere", "--vocab-size", 300, "--output-dir", tmp_path / "tokenizer")
    assert run_tool("train_tokenizer", *arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "tokenizer").exists()
