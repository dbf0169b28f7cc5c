"""The benchmarks of data preparation, on tiny cases."""

import json
from pathlib import Path

import pytest

from benchmarks import data_index, preprocessing


def test_preprocessing_is_compared_with_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mib", "0.2", "--vocab-size", "300", "--workers", "2", "--repeats", "1"]
    assert preprocessing.main([*words, "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["bare library", "bare encode", "preprocess_data", "at work"]
    assert rows[0]["times_bare"] == 1.0
    assert "tokens/s" in capsys.readouterr().out


def test_indices_of_a_corpus_without_tokens_are_timed(tmp_path: Path) -> None:
    words = ["--documents", "1000", "--tokens", "1e5", "--seq-lengths", "128", "--epochs", "1", "2"]
    assert data_index.main([*words, "--output", str(tmp_path / "out")]) == 0
    first, second = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert 2 * first["samples"] <= second["samples"] <= 2 * first["samples"] + 1
    assert first["cached_seconds"] > 0
