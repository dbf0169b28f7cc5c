import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_dataset import IndexedDatasetWriter
from tests.unit.tools.tool import run_tool

SIZES = [0, 1, 2, 3, 4, 10]
NUMBERS = ("--tokenizer-type", "NullTokenizer", "--vocab-size")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return a dataset of documents of SIZES whose tokens count up; the last has two sequences."""
    with IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        first = 0
        for size in SIZES:
            writer.add_sequence(range(first, first + size))
            first += size
            if size < 10:
                writer.end_document()
        writer.add_sequence([first])
    return tmp_path / "data"


def test_counts_and_lengths_are_those_of_the_documents(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("inspect_dataset", prefix, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "prefix": str(prefix), "dtype": "int32", "documents": 6, "empty_documents": 1, "sequences": 7, "tokens": 21,
        "bytes": 84, "min": 0, "mean": 3.5, "max": 11, "median": 2,
        "percentiles": {"1": 0, "5": 0, "25": 1, "50": 2, "75": 4, "95": 11, "99": 11},
    }  # fmt: skip
    assert run_tool("inspect_dataset", prefix) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["documents", "6"] in lines
    assert ["mean", "3.5"] in lines
    assert ["95%", "11"] in lines


def test_a_document_is_shown_as_ids_or_as_text(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("inspect_dataset", prefix, "--document", 3) == 0
    assert capsys.readouterr().out == "3 4 5\n"
    assert run_tool("inspect_dataset", prefix, "--document", 3, "--json", *NUMBERS, 30) == 0
    assert json.loads(capsys.readouterr().out) == {"document": 3, "ids": [3, 4, 5], "text": "3 4 5"}


def test_a_dataset_without_documents_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "none", np.int32):
        pass
    assert run_tool("inspect_dataset", tmp_path / "none", "--plot", tmp_path / "none.png") == 0
    assert ["documents", "0"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_histogram_is_drawn(prefix: Path) -> None:
    assert run_tool("inspect_dataset", prefix, "--plot", prefix.parent / "new" / "lengths.png") == 0
    assert (prefix.parent / "new" / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (("--document", 6), "--document (6) is not there: "),
        (("--document", -1), "--document (-1) is not there: "),
        (("--vocab-size", 20), "token id 20 in document 5 of "),
        ((*NUMBERS, 19), "token id 20 in document 5 of "),
        (("--tokenizer-type", "HFTokenizer"), "HFTokenizer needs --tokenizer-model"),
    ],
)
def test_what_is_not_right_gives_one_line(
    prefix: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], message: str
) -> None:
    assert run_tool("inspect_dataset", prefix, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_vocabulary_that_fits_and_one_that_is_not_given_are_no_fault(prefix: Path) -> None:
    assert run_tool("inspect_dataset", prefix, "--vocab-size", 21) == 0
    assert run_tool("inspect_dataset", prefix, *NUMBERS, 20) == 0


def test_files_that_do_not_belong_together_are_refused(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(f"{prefix}.bin").write_bytes(b"\0" * 80)
    assert run_tool("inspect_dataset", prefix) == 2
    assert "80 bytes, but data.idx lists 21 tokens of int32, 84 bytes" in capsys.readouterr().err
