"""DeepSpeed's writer of files, with two differences: what it wrote is on the disk, and an error waits for its turn.

DeepSpeed ends a save with a barrier. A rank whose disk is full must reach it, or the others wait there for ever; so
the first error is kept, nothing more is written, and the error is raised when the save is over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine


class DurableWriter(TorchCheckpointEngine):
    """Writes the files of one save."""

    def __init__(self, zipfile_serialization: bool) -> None:
        super().__init__()
        self.zipfile_serialization = zipfile_serialization
        self._written: list[Path] = []
        self._error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file; called by DeepSpeed."""
        self.attempt(lambda: self._write(state_dict, Path(path)))

    def attempt(self, work: Callable[[], None]) -> None:
        """Do the work unless something failed before; keep its error."""
        if self._error is None:
            try:
                work()
            except Exception as error:  # torch turns a full disk into a RuntimeError of its own
                self._error = error

    def add(self, path: Path) -> None:
        """Take in a file that was written, once it is on the disk."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self._written.append(path)

    def finish(self) -> list[Path]:
        """What was written. Raises the error that was kept."""
        if self._error is not None:
            raise self._error
        return list(self._written)

    def _write(self, state_dict: Any, path: Path) -> None:
        with path.open("wb") as file:
            torch.save(state_dict, file, _use_new_zipfile_serialization=self.zipfile_serialization)
        self.add(path)
