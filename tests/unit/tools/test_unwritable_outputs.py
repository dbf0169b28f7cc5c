"""An output that cannot be written is one line that says why, for every tool that writes one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.corpus import write_corpus
from tests.unit.logging.reported_runs import RECORD, write_log
from tests.unit.tools.tool import run_tool

PLAN = ["plan_context", "--model", "llama-8b", "--gpus", "8"]
# The tool and its arguments, in which IN is a folder of inputs; the output follows.
WRITERS = {
    "draw_figures": ["draw_figures", "layout", "--folder"],
    "inspect_dataset": ["inspect_dataset", "IN/numbers", "--plot"],
    "make_recall_corpus": ["make_recall_corpus", "--documents", "3", "--output-prefix"],
    "make_stdlib_corpus": ["make_stdlib_corpus", "--source", "IN", "--output"],
    "merge_datasets": ["merge_datasets", "--input", "IN", "--output-prefix"],
    "plan_context, JSON": [*PLAN, "--json"],
    "plan_context, plot": [*PLAN, "--plot"],
    "plot_run": ["plot_run", "IN/run.log", "--output"],
    "report_run": ["report_run", "IN/run.log", "--output"],
    "train_tokenizer": ["train_tokenizer", "--input", "IN/text.jsonl", "--vocab-size", "260", "--output-dir"],
}
OUTPUTS: dict[str, Callable[[Path], Path]] = {
    "too long": lambda folder: folder / f"{300 * 'x'}.png",
    "in a file": lambda folder: folder / "file" / "out.png",
    "where none may be": lambda folder: Path("/proc/none/out.png"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_corpus(folder / "numbers", num_documents=4)
    write_log(folder / "run.log", [RECORD])
    (folder / "text.jsonl").write_text('{"text": "a few words"}\n')
    (folder / "source.py").write_text('"""Source."""\n')
    return folder


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_cannot_be_written_is_one_line(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, output: str
) -> None:
    (tmp_path / "file").touch()
    tool, *arguments = (word.replace("IN/", f"{inputs}/") if word != "IN" else str(inputs) for word in WRITERS[name])
    assert run_tool(tool, *arguments, OUTPUTS[output](tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("error: ", "plot_run: "))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_picture_format_that_does_not_exist_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(*PLAN, "--plot", tmp_path / "plan.picture") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Format 'picture' is not supported")
