import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import WordLevel

from megatron.data.indexed_dataset import IndexedDataset
from tests.unit.tools.tool import run_tool

NUMBERS = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 100)


def write_lines(path: Path, *documents: object) -> Path:
    content = "".join(json.dumps(document) + "\n" for document in documents)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def tokens_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.get_document(k).tolist() for k in range(dataset.num_documents)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_of_json_become_documents_and_empty_ones_are_left_out(tmp_path: Path, name: str, workers: int) -> None:
    source = write_lines(tmp_path / name, {"text": "1 2"}, {"text": ""}, {"text": "3"})
    arguments = ("--append-eod", "--workers", workers, "--output-prefix", tmp_path / "out" / "data")
    assert run_tool("preprocess_data", "--input", source, *NUMBERS, *arguments) == 0
    assert tokens_of(tmp_path / "out" / "data_text_document") == [[1, 2, 100], [3, 100]]


def test_each_key_becomes_a_dataset(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"question": "1", "answer": "2 3"})
    arguments = ("--json-keys", "question", "answer", "--output-prefix", tmp_path / "data")
    assert run_tool("preprocess_data", "--input", source, *NUMBERS, *arguments) == 0
    assert tokens_of(tmp_path / "data_question_document") == [[1]]
    assert tokens_of(tmp_path / "data_answer_document") == [[2, 3]]


def test_a_folder_of_text_files_becomes_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in (2, 1):
        (tmp_path / "texts" / f"{number}.txt").write_text(str(number))
    arguments = ("--input-format", "text", "--output-prefix", tmp_path / "data")
    assert run_tool("preprocess_data", "--input", tmp_path / "texts", *NUMBERS, *arguments) == 0
    assert tokens_of(tmp_path / "data_text_document") == [[1], [2]]


def test_progress_is_reported_every_so_many_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.jsonl", *[{"text": "1"}] * 5)
    monkeypatch.setattr("megatron.data.text_files.RECORDS_PER_BATCH", 1)
    arguments = ("--log-interval", 2, "--output-prefix", tmp_path / "data")
    assert run_tool("preprocess_data", "--input", source, *NUMBERS, *arguments) == 0
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.err.splitlines()] == ["2", "4"]
    assert "5 documents, 5 tokens, uint16" in output.out


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"text": "1"}, {"text": "word"}], "NullTokenizer got 'word'"),
        ([{"text": "1"}, {"body": "1"}], "line 2: no text under the key 'text'; keys found: body"),
        ([{"text": ""}], "the input has no text"),
    ],
)
def test_bad_input_gives_one_line_and_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[object], message: str, workers: int
) -> None:
    source = write_lines(tmp_path / "a.jsonl", *lines)
    arguments = ("--workers", workers, "--output-prefix", tmp_path / "out" / "data")
    assert run_tool("preprocess_data", "--input", source, *NUMBERS, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list((tmp_path / "out").iterdir()) == []


def test_the_tokenizer_may_be_that_of_a_hugging_face_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizers.Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_lines(tmp_path / "a.jsonl", {"text": "b"}, {"text": "a"})
    arguments = ("--input", source, "--append-eod", "--output-prefix", tmp_path / "data", "--hf-model", tmp_path)
    assert run_tool("preprocess_data", *arguments) == 0
    assert tokens_of(tmp_path / "data_text_document") == [[1, 3], [0, 3]]
    with pytest.raises(SystemExit, match="2"):
        run_tool("preprocess_data", *arguments, *NUMBERS)
    assert "--tokenizer-type, --vocab-size and --hf-model (" in capsys.readouterr().err
    assert run_tool("preprocess_data", *arguments[:-1], "someone/model") == 2
    assert "--hf-model (someone/model) is no folder, and nothing is downloaded" in capsys.readouterr().err


def test_missing_input_and_missing_tokenizer_files_exit_with_2(tmp_path: Path) -> None:
    output = ("--output-prefix", tmp_path / "data")
    assert run_tool("preprocess_data", "--input", tmp_path / "nowhere.jsonl", *NUMBERS, *output) == 2
    source = write_lines(tmp_path / "a.jsonl", {"text": "1"})
    assert run_tool("preprocess_data", "--input", source, "--tokenizer-type", "GPT2BPETokenizer", *output) == 2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("form", ["a.jsonl", "a.json"])
def test_a_line_that_is_too_long_is_refused_or_left_out(
    tmp_path: Path, form: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [{"text": "1 2"}, {"text": "3 " * 2**20}, {"text": "4"}]
    source = tmp_path / form
    if form == "a.json":
        source.write_text(json.dumps(documents))
    else:
        write_lines(source, *documents)
    flags = ("--input", source, *NUMBERS, "--workers", workers, "--output-prefix", tmp_path / "out")
    assert run_tool("preprocess_data", *flags, "--max-document-mb", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{source}, {'entry' if form == 'a.json' else 'line'} 2: more than --max-document-mb (1) MiB; cut it" in line
    assert run_tool("preprocess_data", *flags, "--max-document-mb", 1, "--skip-bad-lines") == 0
    assert tokens_of(tmp_path / "out_text_document") == [[1, 2], [4]]
    assert "1 bad lines were left out" in capsys.readouterr().out
    assert run_tool("preprocess_data", *flags) == 0
    assert [len(document) for document in tokens_of(tmp_path / "out_text_document")] == [2, 2**20, 1]


@pytest.mark.parametrize(
    "tool, flags, words",
    [
        ("preprocess_data", ("--input", "a.jsonl", *NUMBERS, "--output-prefix", "x" * 238), "of 256 bytes, xxx"),
        ("preprocess_data", ("--input", "a.jsonl", *NUMBERS, "--output-prefix", "x/" + "é" * 130), "--output-prefix"),
        ("preprocess_data", ("--input", "a.jsonl", *NUMBERS, "--output-prefix", "x", "--json-keys", "k" * 300), "json"),
        ("preprocess_data", ("--input", "x" * 300, *NUMBERS, "--output-prefix", "x"), "stands for no jsonl"),
        ("preprocess_data", ("--input", "a.jsonl", "--tokenizer-type", "HFTokenizer", "--tokenizer-model", "x" * 300,
                             "--output-prefix", "x"), "--tokenizer-model (xxx"),
        ("preprocess_data", ("--input", "a.jsonl", *NUMBERS, "--output-prefix", "x", "--max-document-mb", 10**20),
         "--max-document-mb (100000000000000000000) must be 1 to 1048576; use for example 256"),
        ("train_tokenizer", ("--input", "a.jsonl", "--vocab-size", 300, "--output-dir", "x", "--max-document-mb", 0),
         "--max-document-mb (0) must be 1 to 1048576"),
        ("merge_datasets", ("--input", "a", "--output-prefix", "x" * 252), "--output-prefix gives a file"),
        ("merge_datasets", ("--input", "x" * 300, "--output-prefix", "x"), "is missing"),
        ("inspect_dataset", ("x" * 300,), "is missing"),
        ("train_tokenizer", ("--input", "a.jsonl", "--vocab-size", 300, "--output-dir", "x" * 256), "--output-dir"),
    ],
)  # fmt: skip
def test_a_name_or_a_limit_that_cannot_be_is_one_line_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    flags: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", {"text": "1"})
    assert run_tool(tool, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_longest_name_that_fits_is_written(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "1"})
    prefix = tmp_path / ("x" * 237)
    assert run_tool("preprocess_data", "--input", source, *NUMBERS, "--output-prefix", prefix) == 0
    assert tokens_of(Path(f"{prefix}_text_document")) == [[1]]
