"""Replacement for DeepSpeed's checkpoint reader and writer, different in three ways.

Reading executes no code, whereas DeepSpeed (0.19.8) unpickles whatever a file holds. Written files are flushed to disk.
An error during a save is deferred. DeepSpeed ends a save with a barrier: a rank whose disk is full must reach it, or
the others wait there forever. So the first error is recorded, nothing more is written, and the error is raised when the
save is over.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.weights.torch_files import unreadable

_STAGES = {stage.name: stage for stage in ZeroStageEnum}


def _member(enumeration: type, name: str) -> ZeroStageEnum:
    """Replace `getattr`, with which some versions of Python pickle enum members; accept only ZeRO stages."""
    if enumeration is not ZeroStageEnum or name not in _STAGES:
        raise pickle.UnpicklingError(f"the attribute {name!r} of {enumeration!r} is nothing that a checkpoint needs")
    return _STAGES[name]


# The classes that DeepSpeed's files hold besides tensors and plain values.
_KNOWN: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    fragment_address,
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    (_member, "builtins.getattr"),
]


class SafeReader(TorchCheckpointEngine):
    """Reads the files of a checkpoint without executing code from their pickles."""

    def __init__(self, zipfile_serialization: bool) -> None:
        super().__init__()
        self.zipfile_serialization = zipfile_serialization

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; called by DeepSpeed. WeightsError if it is damaged or names a class that is not known here."""
        try:
            with torch.serialization.safe_globals(_KNOWN):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a damaged file can raise many kinds of errors inside torch
            raise unreadable(Path(path), error) from error


class DurableWriter(SafeReader):
    """Writes the files of one save, and flushes them to disk."""

    def __init__(self, zipfile_serialization: bool) -> None:
        super().__init__(zipfile_serialization)
        self._written: list[Path] = []
        self._error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file; called by DeepSpeed."""
        self.attempt(lambda: self._write(state_dict, Path(path)))

    def attempt(self, work: Callable[[], None]) -> None:
        """Do the work unless an earlier step failed; record its error."""
        if self._error is None:
            try:
                work()
            except Exception as error:  # torch turns a full disk into a RuntimeError of its own
                self._error = error

    def add(self, path: Path) -> None:
        """Flush a written file to disk and record it."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self._written.append(path)

    def finish(self) -> list[Path]:
        """Return the files written. Raises the recorded error."""
        if self._error is not None:
            raise self._error
        return list(self._written)

    def _write(self, state_dict: Any, path: Path) -> None:
        with path.open("wb") as file:
            torch.save(state_dict, file, _use_new_zipfile_serialization=self.zipfile_serialization)
        self.add(path)
