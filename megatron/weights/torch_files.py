"""Memory-mapped torch.save files, read without executing code from their pickles.

DeepSpeed's files hold three of its own classes besides tensors and plain values. They are read as the stand-ins below,
so neither DeepSpeed nor the version that wrote a file is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.weights.errors import WeightsError, first_line


class FragmentAddress:
    """Elements [start, start + numel) of a rank's flat tensor: a parameter's part."""

    start: int
    numel: int


class LossScaler:
    """The state of a loss scaler: numbers and switches."""


class ZeroStage(int):
    """A ZeRO stage."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _member(enumeration: type, name: str) -> ZeroStage:
    """Replace `getattr`, with which some versions of Python pickle enum members; accept only ZeRO stages."""
    if enumeration is not ZeroStage or name not in _STAGES:
        raise WeightsError(f"the attribute {name!r} of {enumeration!r} is nothing that a checkpoint needs")
    return ZeroStage(_STAGES[name])


_STAND_INS: dict[str, Callable[..., Any]] = {
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": LossScaler,
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStage,
    "builtins.getattr": _member,
}
# torch's error when a pickle names a class that `weights_only` does not allow.
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")
_REASON = re.compile(r"WeightsUnpickler error:\s*([^\n]+)")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class MappedFiles:
    """Contents of torch.save files. Files stay mapped until `max_bytes` have been read in total, then all are released.

    Pages of a mapped file count as memory of the process once they are touched. A mapping that lived as long as a
    conversion would grow to the size of the checkpoint.
    """

    def __init__(self, max_bytes: int = 2**26, read: Callable[[Path], Any] | None = None) -> None:
        """`read` maps a file; by default `read_torch_file`."""
        self._max_bytes = max_bytes
        self._read = read or read_torch_file
        self._num_bytes = 0
        self._contents: dict[Path, Any] = {}

    def content(self, path: Path, num_bytes: int) -> Any:
        """Return the content of a file, of which the caller reads `num_bytes`. Copy it: do not hold references."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            self._contents.clear()
            self._num_bytes = num_bytes
        if path not in self._contents:
            self._contents[path] = self._read(path)
        return self._contents[path]


def read_torch_file(path: Path) -> Any:
    """Memory-map a torch.save file; WeightsError if it is damaged or names classes that are not known here."""
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file can raise many kinds of errors inside torch
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> WeightsError:
    """Return the error for a file that torch could not read with `weights_only`."""
    return WeightsError(f"{path} cannot be read ({why_unreadable(error)}); copy it again, or name another checkpoint.")


def why_unreadable(error: Exception) -> str:
    """Extract the reason from torch's error, without its advice to load the file with code execution."""
    refused, reason = _REFUSED.search(str(error)), _REASON.search(str(error))
    if refused:
        return f"it names {refused[1]}, which no checkpoint needs and which was not run"
    return reason[1].strip() if reason else first_line(error)


def loss_scale_state(scaler: object) -> dict[str, float]:
    """Return the numbers of a dynamic loss scaler; empty for a static one, which its flag describes."""
    state = vars(scaler) if isinstance(scaler, LossScaler) else {}
    return {name: state[name] for name in _LOSS_SCALE if name in state} if state.get("dynamic") else {}
