"""Open and verify weights of any kind by path: a DeepSpeed checkpoint, a universal checkpoint, or safetensors.

Every reader uses this module, so one rule holds for all: weights that have a manifest match it, or reading them is an
error. No file that is read can execute code, whoever wrote it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron.weights.deepspeed_checkpoint import is_deepspeed_checkpoint, open_deepspeed_checkpoint
from megatron.weights.errors import WeightsError, first_line
from megatron.weights.manifest import MANIFEST, find_faults, small_files
from megatron.weights.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from megatron.weights.source import StateSource, WeightsAlone
from megatron.weights.universal_checkpoint import UniversalCheckpoint, is_universal_checkpoint

LATEST = "latest"
KINDS = ("DeepSpeed checkpoint", "universal checkpoint", "safetensors")
# Stored next to the weights in every checkpoint that this program saves.
_LAYOUT = "layout.json"
_REPAIR_LATEST = "write global_stepN into it, the name of a folder beside it, or name that folder itself"
LOG = logging.getLogger("megatron")


def read_latest(folder: Path) -> Path | None:
    """Return the checkpoint that `folder`/latest names, whether it exists or not; None without `latest`.

    WeightsError if it names anything but an entry of `folder`.
    """
    file = folder / LATEST
    try:
        name = file.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({first_line(error)}); {_REPAIR_LATEST}.") from error
    if not _is_plain_name(name):
        raise WeightsError(f"{file} holds {name[:80]!r}, which is no name of a checkpoint; {_REPAIR_LATEST}.")
    return folder / name


def _is_plain_name(name: str) -> bool:
    """Return whether a name stays in its folder: one component, without separators or control characters."""
    return name.isprintable() and name not in ("", ".", "..") and not {"/", "\\"} & set(name) and len(name) < 256


def newest_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path`/latest names; `path` itself if there is no such file."""
    return read_latest(Path(path)) or Path(path)


def is_portable(path: Path) -> bool:
    """Return whether a folder holds weights as safetensors."""
    return (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()


def is_layout_free(path: Path) -> bool:
    """Return whether a folder's weights do not depend on ranks or ZeRO stage: portable, or a universal checkpoint."""
    return is_portable(path) or is_universal_checkpoint(path)


def holds_weights(path: Path) -> bool:
    """Return whether a folder itself holds weights of any kind."""
    return is_layout_free(path) or is_deepspeed_checkpoint(path)


def kind_of(path: Path) -> str:
    """Return the kind of weights, one of KINDS; WeightsError if there are none."""
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


def open_state(path: str | Path, with_hashes: bool = True) -> StateSource:
    """Verify weights of any kind and open them, reading no tensor. `path` may be the folder of `latest`.

    Without `with_hashes` the sizes of all files and the hashes of the small ones are verified.

    Raises:
        WeightsError: there are none, or they differ from the manifest.
    """
    path = newest_checkpoint(path)
    verify(path, with_hashes)
    return open_verified(path)


def open_verified(path: Path) -> StateSource:
    """Open weights of any kind that have been verified already; WeightsError if there are none."""
    match kind_of(path):
        case "universal checkpoint":
            return UniversalCheckpoint(path)
        case "DeepSpeed checkpoint":
            return open_deepspeed_checkpoint(path)
        case _:
            return WeightsAlone(SafetensorsFolder(path))


def verify(path: Path, with_hashes: bool = True) -> None:
    """Raise WeightsError unless the files at `path` match its manifest.

    A checkpoint of this program must have a manifest, unless the hashes are left out. Weights of other programs have
    none; for those that DeepSpeed wrote, a warning is logged.
    """
    kind = kind_of(path)
    folder = path if path.is_dir() else path.parent
    if (folder / MANIFEST).is_file():
        faults = find_faults(folder, list if with_hashes else small_files)
    elif kind == "DeepSpeed checkpoint" and (path / _LAYOUT).is_file() and with_hashes:
        faults = [f"it has no {MANIFEST}, so its files cannot be verified; give --no-verify-checkpoint to read it so"]
    else:
        faults = []
        if kind != "safetensors":
            LOG.warning("%s has no %s: it is read unverified", path, MANIFEST)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise WeightsError(f"{path} cannot be read: {faults[0]}{more}; copy it again, or name another checkpoint.")
