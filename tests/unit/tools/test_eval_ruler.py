"""RULER's tasks from the command line: scores, a picture, and predictions in the form that RULER's scorer reads."""

import json
from pathlib import Path

import pytest
import tokenizers

from megatron.evaluation.ruler.scoring import clean, match_all
from tests.unit.evaluation.test_ruler import TEXT
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save("llama", tmp_path / "model")
    letters = {letter: number for number, letter in enumerate(sorted({*"?", *TEXT.lower()}))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="?"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_scores_are_those_of_the_predictions_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--load", folder / "model", "--text", folder / "text.txt", "--lengths", 700, 600, "--samples", 2]
    out = folder / "out"
    assert run_tool("eval_ruler", *flags, "--tasks", "niah_single_2", "niah_multivalue", "--output-dir", out) == 0
    table = capsys.readouterr().out
    content = json.loads((out / "ruler.json").read_text())
    assert [(each["task"], each["length"]) for each in content["scores"]] == [
        (task, length) for length in (600, 700) for task in ("niah_single_2", "niah_multivalue")
    ]
    for each in content["scores"]:
        path = out / "predictions" / str(each["length"]) / f"{each['task']}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["index"] for line in lines] == [0, 1]
        assert all(line["length"] <= each["length"] for line in lines)
        score = match_all([clean(line["pred"]) for line in lines], [line["outputs"] for line in lines])
        assert each["score"] == score
        assert f"{each['task']:<16} {score:>7.2f}" in table
    assert content["averages"].keys() == {"600", "700"}
    assert (out / "ruler.png").is_file()


def test_what_cannot_be_asked_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--load", folder / "model", "--text", folder / "text.txt", "--output-dir", folder / "out"]
    assert run_tool("eval_ruler", *flags, "--lengths", 50) == 2
    assert "niah_single_1 at --lengths 50: " in capsys.readouterr().err
    assert run_tool("eval_ruler", *flags, "--tasks", "qa_1") == 2
    error = capsys.readouterr().err
    assert "qa_1 needs --squad" in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()
