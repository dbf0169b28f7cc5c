"""Output folders are looked at before a training starts, and not made."""

from pathlib import Path

import pytest

from megatron.config import ConfigError
from megatron.preflight import check_writable


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    check_writable("--save", tmp_path / "runs" / "llama")
    check_writable("--save", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_file_in_the_way_is_refused_by_the_flag(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=rf"--save \(.*\): {file} is not a folder; name a folder"):
        check_writable("--save", file / below)


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("megatron.preflight.os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written; name a folder"):
        check_writable("--tensorboard-dir", tmp_path)
