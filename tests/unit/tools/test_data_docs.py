"""The commands of docs/data.md can be typed."""

import shlex

import pytest

from benchmarks import data_index, preprocessing
from tests.unit.tools.tool import TOOLS, load_tool

BENCHMARKS = {"preprocessing": preprocessing, "data_index": data_index}


def commands() -> list[str]:
    text = (TOOLS.parent / "docs" / "data.md").read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_can_be_parsed(command: str) -> None:
    _, path, *words = shlex.split(command, comments=True)
    folder, _, name = path.removesuffix(".py").partition("/")
    (load_tool(name) if folder == "tools" else BENCHMARKS[name]).parse_arguments(words)


def test_every_tool_of_data_preparation_is_shown() -> None:
    text = " ".join(commands())
    assert all(f"tools/{name}.py" in text for name in ("preprocess_data", "inspect_dataset", "merge_datasets"))
