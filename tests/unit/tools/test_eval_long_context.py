"""Both measurements from the command line, and what is refused."""

import json
from pathlib import Path

import pytest

from megatron.data.indexed_dataset import IndexedDataset
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import POSITIONS, VOCAB, save

TOOL, MAKER = "eval_long_context", "make_recall_corpus"
TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1]
FPDT = "--ds-sequence-parallel-fpdt"
CHUNKS = [f"{FPDT}-chunk-size", 8, f"{FPDT}-offloading"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save("gpt2", tmp_path / "model")
    return tmp_path


def corpus(folder: Path, *flags: object) -> Path:
    assert run_tool(MAKER, "--output-prefix", folder / "data", "--documents", 5, "--length", 40, *flags) == 0
    return folder / "data"


def test_the_loss_of_a_dataset_is_that_of_a_text_of_the_same_ids(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = corpus(folder)
    texts = [folder / f"{number}.txt" for number in range(5)]
    for number, text in enumerate(texts):
        text.write_text(" ".join(map(str, IndexedDataset(prefix).get_document(number))))
    measure = ["perplexity", "--load", folder / "model", *TOKENIZER, *CHUNKS, "--scored-tokens", 8, "--contexts", 20, 4]
    capsys.readouterr()
    assert run_tool(TOOL, *measure, "--data-path", prefix, "--output", folder / "loss.json") == 0
    table = capsys.readouterr().out
    assert run_tool(TOOL, *measure, "--text", *texts) == 0
    assert capsys.readouterr().out == table
    contexts = json.loads((folder / "loss.json").read_text())["contexts"]
    assert [each["context"] for each in contexts] == [4, 20]
    assert all(f"{each['loss']:.4f}" in table and each["num_tokens"] == 40 for each in contexts)
    assert run_tool(TOOL, *measure, "--data-path", prefix, "--documents", 2) == 0
    assert capsys.readouterr().out != table


def test_needles_leave_numbers_and_a_picture(folder: Path) -> None:
    flags = ["--load", folder / "model", *TOKENIZER, *CHUNKS, "--lengths", 12, 30, "--depths", 3, "--trials", 2]
    contents = []
    for control in ([], ["--isolated-chunks"]):
        out = folder / f"out{len(control)}"
        assert run_tool(TOOL, "needle", *flags, *control, "--output-dir", out) == 0
        contents.append(json.loads((out / "needle.json").read_text()))
        assert (out / "needle.png").is_file()
        cells = [(cell["length"], cell["depth"]) for cell in contents[-1]["cells"]]
        assert cells == [(n, d) for n in (12, 30) for d in (0, 0.5, 1)]
    whole, isolated = contents
    assert (whole["isolated_chunks"], isolated["isolated_chunks"]) == (False, True)
    assert whole["cells"] != isolated["cells"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["needle", "--lengths", POSITIONS + 1, "--output-dir", "out"],
            "--lengths (49 tokens) must be at most 48, the positions",
        ),
        (["needle", "--lengths", 3, "--output-dir", "out"], "does not fit into a length of 3"),
        (["needle", "--num-values", 60, "--output-dir", "out"], "leave ids for noise"),
        (["perplexity", "--contexts", 41, "--scored-tokens", 8, "--text", "x"], "must be at most 48, the positions"),
        (["perplexity", "--contexts", 4, "--data-path", "nothing", "--scored-tokens", 2], "nothing.idx is missing"),
        (["perplexity", "--contexts", 4, "--text", "nothing", "--scored-tokens", 2], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[object], message: str
) -> None:
    monkeypatch.chdir(folder)
    if "--lengths" not in flags and flags[0] == "needle":
        flags = [*flags, "--lengths", 30]
    assert run_tool(TOOL, *flags, "--load", folder / "model", *TOKENIZER) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


def test_ids_that_the_model_lacks_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = corpus(folder, "--vocab-size", 200)
    flags = ["--data-path", prefix, "--contexts", 20, "--scored-tokens", 8]
    assert run_tool(TOOL, "perplexity", "--load", folder / "model", *TOKENIZER, *flags) == 2
    assert f"outside the vocabulary, ids 0 to {VOCAB - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--num-keys", 40], ["--max-mentions", 20], ["--ends-every", 1]])
def test_a_corpus_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[object]
) -> None:
    assert run_tool(MAKER, "--output-prefix", tmp_path / "data", "--length", 40, *flags) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
