"""Choice of the checkpoint to resume from: the newest one that is undamaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from megatron.checkpointing.agreement import on_all_ranks, on_first_rank
from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.folder import checkpoint_path, checkpoints, iteration_of, named_checkpoints
from megatron.config import CheckpointConfig
from megatron.initialize import Context
from megatron.weights.errors import first_line
from megatron.weights.manifest import MANIFEST, Manifest, Selection, find_faults, small_files
from megatron.weights.opening import holds_weights, is_layout_free, is_portable, read_latest

_REMEDY = (
    "name a folder of checkpoints, one of them (global_stepN) or a folder of safetensors; to start from scratch, leave "
    "--load out, or name the folder of --save, from which the run resumes once it has saved"
)


def find_checkpoint(settings: CheckpointConfig) -> Path | None:
    """Find the checkpoint to load, checking sizes and small files only; None where a new run starts.

    For one process, before anything is allocated. CheckpointError or WeightsError where --load finds nothing, or where
    none of the checkpoints there can be loaded.
    """
    return _first_good(_candidates(settings), lambda path: _faults(path, settings, small_files), settings)[0]


def choose_checkpoint(settings: CheckpointConfig, context: Context) -> Path | None:
    """Choose the checkpoint to load and verify every file of it; the same on all ranks. Collective over all ranks.

    A damaged one is skipped in favor of the newest older one, with a warning, unless --ckpt-step asked for it. The
    ranks share the hashing. None where a new run starts; CheckpointError like `find_checkpoint`.
    """
    rank, num_ranks = context.parallel_state.rank, context.parallel_state.world_size

    def own_share(manifest: Manifest) -> list[str]:
        by_size = sorted(manifest, key=lambda name: (manifest[name].size_bytes, name))
        return small_files(manifest) if settings.no_verify_checkpoint else by_size[rank::num_ranks]

    def faults(path: Path) -> list[str]:
        found = on_all_ranks(lambda: _faults(path, settings, own_share))
        return sorted({fault for faults_of_rank in found for fault in faults_of_rank})

    candidates = on_first_rank(lambda: _candidates(settings))
    chosen, passed_over = _first_good(candidates, faults, settings)
    for reason in passed_over:
        context.log.warning("%s; loading the newest older one, %s, in its place", reason, chosen)
    if chosen is not None and not (chosen / MANIFEST).is_file() and not is_portable(chosen):
        context.log.warning("%s has no %s: it is loaded unverified", chosen, MANIFEST)
    return chosen


def _candidates(settings: CheckpointConfig) -> list[Path]:
    """List what may be loaded, best first; empty where a new run starts. CheckpointError if --load finds nothing."""
    if settings.load is None:
        return []
    folder = Path(settings.load)
    try:
        found = _found(folder, settings.ckpt_step)
    except OSError as error:
        raise CheckpointError(f"--load ({folder}) cannot be read: {first_line(error)}; {_REMEDY}.") from error
    if not found and not _is_new_run(settings):
        what = "holds no checkpoint" if folder.is_dir() else "is a file" if folder.exists() else "is not there"
        raise CheckpointError(f"--load ({folder}) {what}; {_REMEDY}.")
    return found


def _found(folder: Path, ckpt_step: int | None) -> list[Path]:
    """List the checkpoint asked for; else the one that `latest` names and older ones; else the folder itself."""
    itself = [Path(os.path.abspath(folder))] if holds_weights(folder) else []
    if ckpt_step is not None:
        asked = checkpoint_path(folder, ckpt_step)
        return itself if itself and itself[0].name == asked.name else [asked]
    latest = read_latest(folder)
    if latest is not None:
        return [latest, *(path for path in checkpoints(folder, iteration_of(latest)) if path != latest)]
    return itself or named_checkpoints(folder)


def _is_new_run(settings: CheckpointConfig) -> bool:
    """Return whether --load names the folder of --save, so that a later start resumes from it."""
    if settings.load is None or settings.save is None or settings.finetune:
        return False
    return os.path.realpath(settings.load) == os.path.realpath(settings.save)


def _first_good(
    candidates: list[Path], faults: Callable[[Path], list[str]], settings: CheckpointConfig
) -> tuple[Path | None, list[str]]:
    """Return (the first without a fault, reasons for skipping those before it). CheckpointError if all have one."""
    passed_over: list[str] = []
    for path in candidates:
        found = faults(path)
        if not found:
            return path, passed_over
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        passed_over.append(f"the checkpoint {path} cannot be loaded: {found[0]}{more}")
    if not passed_over:
        return None, []
    remedy = "name another --ckpt-step" if settings.ckpt_step is not None else "no older one can take its place"
    raise CheckpointError(f"{'; '.join(passed_over)}; {remedy}; restore the files, or point --load elsewhere.")


def _faults(path: Path, settings: CheckpointConfig, selection: Selection) -> list[str]:
    """List the faults of a checkpoint: wrong sizes of any file, and wrong hashes of those selected."""
    if not path.is_dir():
        return [f"{path.name} is missing"]
    if (path / MANIFEST).is_file():
        return find_faults(path, selection)
    if settings.allow_unverified_checkpoint or is_layout_free(path):
        return []
    return [
        f"it has no {MANIFEST}, so its files cannot be verified; give --allow-unverified-checkpoint if you know that "
        "they are whole"
    ]
