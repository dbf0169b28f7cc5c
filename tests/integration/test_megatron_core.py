"""PyPI's megatron-core reads what is written here and the other way round, token for token.

Both packages are called megatron, so the other one runs in an environment of its own: MEGATRON_CORE_PYTHON names its
Python. `make test-megatron-core` makes the environment and runs this.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed_dataset import IndexedDataset
from tests.unit.data import megatron_core_files
from tests.unit.data.megatron_core_files import DOCUMENTS, FILES, contents, write_with_ours

PYTHON = os.environ.get("MEGATRON_CORE_PYTHON", "")
SCRIPT = Path(__file__).with_name("megatron_core_dataset.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MEGATRON_CORE_PYTHON names no Python with megatron-core"),
]


def run_megatron_core(action: str, folder: Path) -> str:
    # -I: neither PYTHONPATH nor the working folder may bring this repository's megatron in.
    command = [PYTHON, "-I", "-W", "ignore", str(SCRIPT), action, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that says what is to be written."""
    (tmp_path / "documents.json").write_text(json.dumps(DOCUMENTS))
    return tmp_path


def test_megatron_core_reads_what_is_written_here(folder: Path) -> None:
    for name in DOCUMENTS:
        write_with_ours(folder / name, name)
    found: dict[str, Any] = json.loads(run_megatron_core("read", folder))
    for name, documents in DOCUMENTS.items():
        tails = [sequence[1:] for document in documents for sequence in document if len(sequence) > 1]
        assert found[name] == {"dtype": name, "documents": documents, "tails": tails}


def test_what_megatron_core_writes_is_read_here_and_is_what_the_quick_tests_hold_on_to(folder: Path) -> None:
    run_megatron_core("write", folder)
    for name, documents in DOCUMENTS.items():
        assert megatron_core_files.read_with_ours(folder / name) == documents
        assert IndexedDataset(folder / name).dtype.name == name
        assert contents(folder / name) == contents(FILES / name)
