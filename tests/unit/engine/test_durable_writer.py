"""The writer of DeepSpeed's files: what it lists is on the disk, and its error waits until it is asked for."""

import os
from pathlib import Path

import pytest
import torch

from megatron.engine.durable_writer import DurableWriter


def test_every_file_is_flushed_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    writer = DurableWriter(zipfile_serialization=True)
    state = {"weight": torch.arange(5.0)}
    writer.save(state, str(tmp_path / "first.pt"))
    (tmp_path / "script.py").write_text("pass\n")
    writer.add(tmp_path / "script.py")
    assert writer.finish() == [tmp_path / "first.pt", tmp_path / "script.py"]
    assert flushed == [str(path) for path in writer.finish()]
    assert torch.equal(torch.load(tmp_path / "first.pt", weights_only=True)["weight"], state["weight"])


def test_the_first_error_is_kept_and_nothing_is_written_after_it(tmp_path: Path) -> None:
    writer = DurableWriter(zipfile_serialization=True)
    writer.save({}, str(tmp_path / "absent" / "first.pt"))
    writer.save({}, str(tmp_path / "second.pt"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"absent/first\.pt"):
        writer.finish()
