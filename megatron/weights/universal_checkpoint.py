"""Universal checkpoints in DeepSpeed's format, which do not depend on the number of ranks or the ZeRO stage.

    zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt    one whole parameter and its moments, {"param": tensor}
    zero/NAME/step.pt                               steps that Adam has taken
    zero/optimizer_state.pt                         the same, and the state of the fp16 loss scale
    manifest.json                                   size and hash of every file; DeepSpeed's converter writes none

The output of DeepSpeed's own converter is read too. From ZeRO-3 it writes bare flat tensors, no step.pt, and the shapes
in a copy of the model's file. From ZeRO 1 and 2 with `round_robin_gradients` it (0.19.8) mixes up the parameters. The
shapes in its copy of the model's file are then in another order than the model's, and such a checkpoint is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from megatron.core.atomic_file import flush_to_disk, temporary_path
from megatron.weights.errors import WeightsError, raise_if_no_room
from megatron.weights.manifest import seal
from megatron.weights.source import PARTS, WEIGHTS, StateSource
from megatron.weights.torch_files import loss_scale_state, read_torch_file

_FOLDER = "zero"
_COMMON = "optimizer_state.pt"


def is_universal_checkpoint(path: Path) -> bool:
    """Return whether a folder holds a universal checkpoint."""
    return (path / _FOLDER / _COMMON).is_file()


class UniversalCheckpoint:
    """A StateSource over one universal checkpoint."""

    def __init__(self, path: Path) -> None:
        """Open the checkpoint; WeightsError if there is none at `path`."""
        if not is_universal_checkpoint(path):
            raise WeightsError(f"{path} holds no universal checkpoint ({_FOLDER}/{_COMMON}); name one.")
        self.path = path
        common = read_torch_file(path / _FOLDER / _COMMON)
        self.names = tuple(sorted(file.parent.name for file in (path / _FOLDER).glob(f"*/{WEIGHTS}.pt")))
        self._shapes = _saved_shapes(path)
        _refuse_another_order(path)
        self.step: int | None = self._step(common)
        scaler = common.get("loss_scaler")
        self.loss_scale: Mapping[str, float] = dict(scaler) if isinstance(scaler, dict) else loss_scale_state(scaler)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self._shapes.get(name) or tuple(self._tensor(name, WEIGHTS).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter: fp32."""
        return self._tensor(name, WEIGHTS).dtype

    def get(self, name: str) -> Tensor:
        """Read the whole master weights of a parameter, on the CPU."""
        return self._tensor(name, WEIGHTS).clone().view(self.shape(name))

    def parts(self, name: str) -> tuple[str, ...]:
        """List the stored parts of a parameter: the weights, and the moments unless it was frozen."""
        return tuple(part for part in PARTS if (self.path / _FOLDER / name / f"{part}.pt").is_file())

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        """Read elements [start, start + count) of the flattened weights ("fp32") or a moment; [count], on the CPU."""
        return self._tensor(name, part).reshape(-1)[start : start + count].clone()

    def _tensor(self, name: str, part: str) -> Tensor:
        """Return a tensor that is memory-mapped, not read."""
        file = self.path / _FOLDER / name / f"{part}.pt"
        if not file.is_file():
            raise WeightsError(f"{file} is not there; copy the whole of {self.path}.")
        content = read_torch_file(file)
        tensor: Tensor = content["param"] if isinstance(content, dict) else content
        return tensor.detach()

    def _step(self, common: Mapping[str, Any]) -> int:
        if "step" in common:
            return int(common["step"])
        if "optimizer_state_dict" in common:
            return int(common["optimizer_state_dict"]["state"][0]["step"])
        return int(read_torch_file(self.path / _FOLDER / self.names[0] / "step.pt"))


def write_universal_checkpoint(
    source: StateSource, path: Path, companions: Sequence[Path] = (), report: Callable[[str], None] = lambda name: None
) -> None:
    """Write weights and moments to a new folder `path`, one tensor at a time; it appears only when complete.

    `companions` are files to copy into the folder. `report` is called with each name before its tensors are read.
    WeightsError if `path` exists, or if the source has no moments.
    """
    if source.step is None:
        raise WeightsError("weights alone do not make a universal checkpoint; start from a checkpoint of training.")
    if path.exists():
        raise WeightsError(f"{path} exists; name a new folder, or remove it.")
    is_first = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = temporary_path(path)
    try:
        for name in source.names:
            report(name)
            _write_parameter(source, name, staging / _FOLDER / name)
        common = {"step": source.step, "loss_scaler": dict(source.loss_scale)}
        _save(common, staging / _FOLDER / _COMMON)
        for file in companions:
            shutil.copyfile(file, staging / file.name)
        seal(staging)
        staging.rename(path)
        flush_to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        raise_if_no_room(error, path)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_first:
            with suppress(OSError):  # raised if the folder is not empty
                path.parent.rmdir()


def _write_parameter(source: StateSource, name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    shape = source.shape(name)
    for part in source.parts(name):
        tensor = source.read(name, part, 0, Size(shape).numel()).view(shape)
        _save({"param": tensor, "cat_dim": 0}, folder / f"{part}.pt")
    _save(source.step, folder / "step.pt")


def _save(content: object, path: Path) -> None:
    """Save with torch.save through an open file, whose OSError says why it cannot be written."""
    with path.open("wb") as file:
        torch.save(content, file)


def _saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read shapes by name from the copy of ZeRO-3's model file, if DeepSpeed's converter left one."""
    file = path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    groups = read_torch_file(file)["param_shapes"] if file.is_file() else ()
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _refuse_another_order(path: Path) -> None:
    """Raise WeightsError if DeepSpeed's converter read the parameters of ZeRO 1 or 2 in the wrong order."""
    file = path / "mp_rank_00_model_states.pt"
    model = read_torch_file(file) if file.is_file() else {}
    for shapes in model.get("param_shapes") or ():
        if [name for name in model["module"] if name in shapes] not in ([], list(shapes)):
            raise WeightsError(
                f"{path} was converted by DeepSpeed from a checkpoint with round_robin_gradients, whose parameters it "
                "mixes up; convert that checkpoint with tools/make_universal_checkpoint.py."
            )
