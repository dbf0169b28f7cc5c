"""Weights of any kind behind one path: a checkpoint of DeepSpeed, a universal one, or safetensors."""

from __future__ import annotations

from pathlib import Path

from megatron.weights.deepspeed_checkpoint import is_deepspeed_checkpoint, open_deepspeed_checkpoint
from megatron.weights.errors import WeightsError
from megatron.weights.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from megatron.weights.source import StateSource, WeightsAlone
from megatron.weights.universal_checkpoint import UniversalCheckpoint, is_universal_checkpoint

LATEST = "latest"
KINDS = ("DeepSpeed checkpoint", "universal checkpoint", "safetensors")


def read_latest(folder: Path) -> Path | None:
    """The checkpoint that `folder`/latest names, whether it is there or not; None without `latest`."""
    try:
        name = (folder / LATEST).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return folder / name if name else None


def newest_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path`/latest names; `path` itself where there is no such file."""
    return read_latest(Path(path)) or Path(path)


def is_portable(path: Path) -> bool:
    """Whether a folder holds weights as safetensors."""
    return (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()


def executes_nothing(path: Path) -> bool:
    """Whether a folder holds what is read without running code in it: portable weights or a universal checkpoint."""
    return is_portable(path) or is_universal_checkpoint(path)


def kind_of(path: Path) -> str:
    """One of KINDS; WeightsError where there is none of them."""
    if is_universal_checkpoint(path):
        return KINDS[1]
    if is_deepspeed_checkpoint(path):
        return KINDS[0]
    if is_portable(path) or path.suffix == ".safetensors":
        return KINDS[2]
    what = "holds" if path.is_dir() else "is not there:"
    raise WeightsError(
        f"{path} {what} no weights; name a checkpoint (DIR or DIR/global_stepN), a universal one, or a folder of "
        "safetensors."
    )


def open_state(path: str | Path) -> StateSource:
    """Open weights of any kind, reading no tensor. `path` may be the folder of `latest`.

    Raises:
        WeightsError: there are none, or they are not whole.
    """
    path = newest_checkpoint(path)
    match kind_of(path):
        case "universal checkpoint":
            return UniversalCheckpoint(path)
        case "DeepSpeed checkpoint":
            return open_deepspeed_checkpoint(path)
        case _:
            return WeightsAlone(SafetensorsFolder(path))
