"""An interrupted run resumes, to the same bytes; what it cannot resume from is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron.data import workspace
from megatron.data.encoding import EncodedBatch
from tests.unit.tools.tool import TOOLS, load_tool

NUMBERS = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "5000")
TWO_KEYS = ("--json-keys", "a", "b")
NUM_FILES, LINES_PER_FILE = 3, 7


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a folder of files with two texts a line, one of them empty at times."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in range(NUM_FILES):
        lines = [{"a": f"{file} {line} 9", "b": "" if line % 3 else str(line)} for line in range(LINES_PER_FILE)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the tool, reading two lines at a time and saving its place after each two."""
    monkeypatch.setattr("megatron.data.text_files.RECORDS_PER_BATCH", 2)
    return load_tool("preprocess_data")


def words(corpus: Path, *more: object) -> list[str]:
    prefix = corpus.parent / "out" / "data"
    flags = ("--input", corpus, "--output-prefix", prefix, "--save-seconds", 0, *NUMBERS, *TWO_KEYS, *more)
    return [str(word) for word in flags]


def outputs(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((corpus.parent / "out").iterdir()) if path.is_file()}


def interrupt_after(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Let the next run of the tool end, as by Ctrl-C, when so many batches are encoded."""
    encode_batches = tool.encode_batches

    def encode(*arguments: object) -> Iterator[EncodedBatch]:
        monkeypatch.setattr(tool, "encode_batches", encode_batches)
        for number, batch in enumerate(encode_batches(*arguments)):
            if number == num_batches:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(tool, "encode_batches", encode)


@pytest.fixture
def uninterrupted(corpus: Path, tool: ModuleType) -> dict[str, bytes]:
    """Return the files of a run in one piece, which are then removed."""
    assert tool.main(words(corpus)) == 0
    found = outputs(corpus)
    for name in found:
        (corpus.parent / "out" / name).unlink()
    assert list((corpus.parent / "out").iterdir()) == []
    return found


@pytest.mark.parametrize("num_batches", range(NUM_FILES * 4))
def test_a_run_interrupted_anywhere_resumes_to_the_same_bytes(
    corpus: Path,
    tool: ModuleType,
    uninterrupted: dict[str, bytes],
    num_batches: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt_after(tool, monkeypatch, num_batches)
    assert tool.main(words(corpus)) == 130
    assert outputs(corpus) == {}
    capsys.readouterr()
    assert tool.main(words(corpus)) == 0
    assert outputs(corpus) == uninterrupted
    assert ("resuming after" in capsys.readouterr().err) == (num_batches > 0)
    assert sorted(path.name for path in (corpus.parent / "out").iterdir()) == list(uninterrupted)


def test_a_run_ended_while_its_files_are_moved_resumes_to_the_same_bytes(
    corpus: Path, tool: ModuleType, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = workspace.publish
    for num_moved in range(4):
        moves = iter([*[publish] * num_moved, interrupt])
        monkeypatch.setattr(workspace, "publish", lambda *paths, moves=moves: next(moves)(*paths))
        assert tool.main(words(corpus)) == 130
        assert not any(f"{name[:-4]}.bin" not in outputs(corpus) for name in outputs(corpus) if name.endswith(".idx"))
        monkeypatch.setattr(workspace, "publish", publish)
        assert tool.main(words(corpus)) == 0
        assert outputs(corpus) == uninterrupted


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "more, message",
    [
        (("--append-eod",), "--append-eod is True and was False in the interrupted run that .* give --restart"),
        (("--vocab-size", 6000), "--vocab-size is 6000 and was 5000"),
        (("--json-keys", "a"), "--json-keys is .'a'. and was .'a', 'b'."),
    ],
)
def test_another_flag_is_refused_by_name_until_restart(
    corpus: Path, tool: ModuleType, more: tuple[object, ...], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    interrupt_after(tool, monkeypatch, 5)
    assert tool.main(words(corpus)) == 130
    capsys.readouterr()
    assert tool.main(words(corpus, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert tool.main(words(corpus, *more, "--restart")) == 0


def test_a_changed_input_that_was_read_is_refused_by_name(
    corpus: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(tool, monkeypatch, 5)
    tool.main(words(corpus))
    capsys.readouterr()
    first = corpus / "0.jsonl"
    status = first.stat()
    first.write_text(first.read_text().replace("9", "8"))
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert first.stat().st_size == status.st_size
    assert tool.main(words(corpus)) == 2
    assert "0.jsonl, has changed; give --restart to start over" in capsys.readouterr().err
    (corpus / "-.jsonl").write_text('{"a": "1", "b": "1"}\n')
    assert tool.main(words(corpus)) == 2
    assert "0.jsonl, is now " in capsys.readouterr().err


def test_a_repaired_file_is_read_again_and_those_before_it_are_not(
    corpus: Path, tool: ModuleType, uninterrupted: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (corpus / "1.jsonl").read_text()
    (corpus / "1.jsonl").write_text("".join(whole.splitlines(keepends=True)[:5]) + "{\n")
    assert tool.main(words(corpus)) == 2
    assert "1.jsonl, line 6: not JSON" in capsys.readouterr().err
    (corpus / "1.jsonl").write_text(whole)
    assert tool.main(words(corpus)) == 0
    assert "resuming after file 1 and 0 records" in capsys.readouterr().err
    assert outputs(corpus) == uninterrupted


def test_what_was_written_behind_the_note_is_dropped(
    corpus: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(tool, monkeypatch, NUM_FILES * 4 - 1)
    assert tool.main(words(corpus)) == 130
    (corpus / "2.jsonl").write_text('{"a": "1", "b": "2"}\n')
    assert tool.main(words(corpus)) == 0
    gone_on = outputs(corpus)
    assert tool.main(words(corpus)) == 0
    assert gone_on == outputs(corpus)


def test_an_input_that_changes_while_it_is_read_is_refused(
    corpus: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_batches = tool.encode_batches

    def encode(*arguments: object) -> Iterator[EncodedBatch]:
        for batch in encode_batches(*arguments):
            with (corpus / "0.jsonl").open("a") as file:
                file.write("\n")
            yield batch

    monkeypatch.setattr(tool, "encode_batches", encode)
    assert tool.main(words(corpus)) == 2
    assert "0.jsonl was changed while it was read; run again once it is whole" in capsys.readouterr().err
    assert outputs(corpus) == {}


def test_a_full_disk_keeps_what_was_written(
    corpus: Path, tool: ModuleType, uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flush, flushes = workspace.PartialDataset.flush, iter(range(100))

    def flush_until_full(dataset: workspace.PartialDataset) -> None:
        if next(flushes) == 6:
            raise OSError(28, "No space left on device")
        flush(dataset)

    monkeypatch.setattr(workspace.PartialDataset, "flush", flush_until_full)
    assert tool.main(words(corpus)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert outputs(corpus) == {}
    assert tool.main(words(corpus)) == 0
    assert "resuming after file 0 and 6 records" in capsys.readouterr().err
    assert outputs(corpus) == uninterrupted


def test_two_runs_do_not_write_the_same_output(
    corpus: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_encode, codes = tool.encode_batches, []

    def encode(*arguments: object) -> Iterator[EncodedBatch]:
        if not codes:
            codes.append(tool.main(words(corpus)))
        yield from run_encode(*arguments)

    monkeypatch.setattr(tool, "encode_batches", encode)
    assert tool.main(words(corpus)) == 0
    assert codes == [2]
    assert "in use by another process that writes the same output" in capsys.readouterr().err


def test_skipped_lines_are_counted_over_an_interruption(
    corpus: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "0.jsonl").write_bytes(b'{"a": "1"}\n\xff\n[]\n{"a": "1", "b": "2"}\n')
    (corpus / "2.jsonl").write_text('{"a": "1", "b": "2"}\n{')
    interrupt_after(tool, monkeypatch, 5)
    assert tool.main(words(corpus, "--skip-bad-lines")) == 130
    assert tool.main(words(corpus)) == 2
    assert tool.main(words(corpus, "--skip-bad-lines")) == 0
    output = capsys.readouterr()
    assert "the interrupted run left out 3 bad lines; give --skip-bad-lines to resume" in output.err
    for where in ("0.jsonl, line 1: no text under the key 'b'", "line 2: not UTF-8", "2.jsonl, line 2: not JSON"):
        assert where in output.err
    assert output.out.splitlines()[-1] == "4 bad lines were left out"


def test_a_killed_run_takes_its_workers_along_and_resumes_to_the_same_bytes(corpus: Path) -> None:
    with (corpus / "2.jsonl").open("w") as file:
        file.writelines(f'{{"a": "{k % 5000} 1", "b": "{k % 7}"}}\n' for k in range(300_000))
    note = corpus.parent / "out" / "data.preprocessing" / "note.json"
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), *words(corpus, "--workers", 2)]
    process = subprocess.Popen(command, start_new_session=True)
    wait_for(lambda: note.exists() and json.loads(note.read_text())["mark"]["position"]["file"] == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes_of_session(process.pid))
    assert outputs(corpus) == {}
    tool = load_tool("preprocess_data")
    assert tool.main(words(corpus, "--save-seconds", 30)) == 0
    after_kill = outputs(corpus)
    assert tool.main(words(corpus, "--save-seconds", 30)) == 0
    assert outputs(corpus) == after_kill
    assert len(after_kill["data_a_document.bin"]) > 4 * 300_000


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of_session(session: int) -> list[int]:
    """Processes, other than ended ones, of the session that a process has begun."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found
