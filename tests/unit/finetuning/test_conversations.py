"""Three forms of a line, and one clear sentence about any other."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.data.errors import DataError
from megatron.finetuning.conversation_files import read_conversations
from megatron.finetuning.conversations import Conversation, Message

ANSWER = {"role": "assistant", "content": "yes"}
QUESTION = {"role": "user", "content": "ready?"}


def chat(question: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", "yes")))


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "record, question",
    [
        ({"messages": [QUESTION, ANSWER], "id": 3}, "ready?"),
        ({"prompt": "ready?", "response": "yes"}, "ready?"),
        ({"instruction": "ready?", "output": "yes"}, "ready?"),
        ({"instruction": "Upper case.", "input": "ready?", "output": "yes"}, "Upper case.\n\nready?"),
    ],
)
def test_each_form_is_read(tmp_path: Path, record: dict[str, Any], question: str) -> None:
    path = write_lines(tmp_path / "lines", "", record)
    assert list(read_conversations(path)) == [(2, chat(question))]


def test_a_file_may_be_one_array_and_packed(tmp_path: Path) -> None:
    records = [{"instruction": "ready?", "input": "", "output": "yes"}, {"messages": [QUESTION, ANSWER]}]
    expected = [(number, chat("ready?")) for number in (1, 2)]
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(records, indent=4))
    assert list(read_conversations(path)) == expected
    packed = tmp_path / "lines.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    assert list(read_conversations(packed)) == expected
    path.write_text(json.dumps([*records, {"text": "plain"}]))
    with pytest.raises(DataError, match=r"alpaca_data\.json, entry 3: keys text; give an object with"):
        list(read_conversations(path))


@pytest.mark.parametrize("form", ['{"prompt": "a", "response": "b"}\n%s\n', '[{"prompt": "a", "response": "b"},%s]'])
def test_a_conversation_that_is_too_long_for_memory_is_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / "data"
    path.write_text(form % json.dumps({"prompt": "a" * 2**20, "response": "b"}))
    with pytest.raises(DataError, match=r"data, (line|entry) 2: more than --max-document-mb \(1\) MiB"):
        list(read_conversations(path, max_document_mb=1))
    assert len(list(read_conversations(path, max_document_mb=2))) == 2


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON (brackets are nested too deep)"),
        ('{"prompt": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit"),
        ("[1]", "a JSON list; give an object"),
        ({"text": "plain"}, 'keys text; give an object with "messages"'),
        ({"messages": "hello"}, '"messages" is no list'),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "'content' is null, not text"),
        ({"messages": [{"role": "judge", "content": "x"}, ANSWER]}, "turn 1 has the role 'judge'; use one of system"),
        ({"messages": [QUESTION, ANSWER | {"content": " \n"}]}, "turn 2, an answer of the assistant, is empty"),
        ({"messages": [QUESTION]}, "no turn of the assistant"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, "the last turn is of the user"),
        ({"prompt": "x", "response": ""}, "is empty"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: Any, words: str) -> None:
    path = write_lines(tmp_path / "lines", {"messages": [QUESTION, ANSWER]}, line)
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert words in str(caught.value)


CALLS = [
    {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"name": name, "arguments": given}]}]}
    for name, given in (("sky", {"city": "Paris"}), ("sum", {"terms": [1, 2]}))
]


def write_parquet(path: Path, row: dict[str, str]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([row]), path)


def write_rows(path: Path, kind: str) -> Path:
    """Write two files of rows, a Parquet file or a folder as `save_to_disk` of datasets writes it."""
    arrow = pytest.importorskip("pyarrow")
    rows = [arrow.Table.from_pylist([record | {"id": 7}]) for record in [{"messages": [QUESTION, ANSWER]}, *CALLS]]
    table = arrow.concat_tables(rows, promote_options="permissive")
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path.with_suffix(".parquet"), row_group_size=2)
        return path.with_suffix(".parquet")
    path.mkdir()
    names = [f"data-0000{place}-of-00002.arrow" for place in range(2)]
    for name, part in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
        with arrow.OSFile(str(path / name), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_rows_are_the_conversations_of_the_same_json(tmp_path: Path, kind: str) -> None:
    """A column of Arrow gives each object the keys of all, null where it has none; those are not there."""
    expected = list(read_conversations(write_lines(tmp_path / "lines", {"messages": [QUESTION, ANSWER]}, *CALLS)))
    path = write_rows(tmp_path / "rows", kind)
    assert list(read_conversations(path)) == expected
    write_parquet(tmp_path / "big.parquet", {"prompt": "a" * 2**20, "response": "b"})
    with pytest.raises(DataError, match=r"big\.parquet, row 1: more than --max-document-mb \(1\) MiB"):
        list(read_conversations(tmp_path / "big.parquet", max_document_mb=1))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", "folder")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["rows", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits rows, test; give the folder of one, such as .*rows\."):
        list(read_conversations(tmp_path))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["rows"]}')
    assert len(list(read_conversations(tmp_path))) == 3
    file = path / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow cannot be read"):
        list(read_conversations(path))
    file.unlink()
    with pytest.raises(DataError, match=r"has no .*data-00001-of-00002\.arrow, which its state\.json names"):
        list(read_conversations(path))
    write_parquet(tmp_path / "x.parquet", {"text": "x"})
    with pytest.raises(DataError, match=r"x\.parquet: columns text; one of messages, conversations, .* is needed"):
        list(read_conversations(tmp_path / "x.parquet"))
