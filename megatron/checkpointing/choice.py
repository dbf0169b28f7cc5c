"""Which checkpoint a run goes on from: the newest one that is what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron.checkpointing.agreement import on_all_ranks, on_first_rank
from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.folder import checkpoint_path, checkpoints, iteration_of
from megatron.checkpointing.manifest import MANIFEST, Manifest, hash_faults, read_manifest, size_faults
from megatron.config import CheckpointConfig
from megatron.initialize import Context
from megatron.weights.opening import executes_nothing, is_portable, read_latest

# Names of the files of a checkpoint that are to be hashed.
Selection = Callable[[Manifest], list[str]]


def find_checkpoint(settings: CheckpointConfig) -> Path | None:
    """The checkpoint to load as far as sizes and small files tell; None where there is none yet.

    For one process, before anything is allocated. CheckpointError where none of those there can be loaded.
    """
    return _first_good(_candidates(settings), lambda path: _faults(path, settings, _small_files), settings)[0]


def choose_checkpoint(settings: CheckpointConfig, context: Context) -> Path | None:
    """The checkpoint to load, every file of it verified, the same on all ranks. Collective over all ranks.

    A damaged one is passed over for the newest older one, with a warning, unless --ckpt-step asked for it. The ranks
    share the hashing. CheckpointError where none of those there can be loaded.
    """
    rank, num_ranks = context.parallel_state.rank, context.parallel_state.world_size

    def own_share(manifest: Manifest) -> list[str]:
        by_size = sorted(manifest, key=lambda name: (manifest[name].size_bytes, name))
        return _small_files(manifest) if settings.no_verify_checkpoint else by_size[rank::num_ranks]

    def faults(path: Path) -> list[str]:
        found = on_all_ranks(lambda: _faults(path, settings, own_share))
        return sorted({fault for faults_of_rank in found for fault in faults_of_rank})

    candidates = on_first_rank(lambda: _candidates(settings))
    chosen, passed_over = _first_good(candidates, faults, settings)
    for reason in passed_over:
        context.log.warning("%s; loading the newest older one, %s, in its place", reason, chosen)
    if chosen is not None and not (chosen / MANIFEST).is_file() and not executes_nothing(chosen):
        context.log.warning("%s has no %s: it is loaded unverified", chosen, MANIFEST)
    return chosen


def _candidates(settings: CheckpointConfig) -> list[Path]:
    """What may be loaded, best first: the checkpoint asked for; else the one `latest` names, then older ones."""
    if settings.load is None:
        return []
    folder = Path(settings.load)
    if is_portable(folder):
        return [folder]
    if settings.ckpt_step is not None:
        return [checkpoint_path(folder, settings.ckpt_step)]
    latest = read_latest(folder)
    if latest is None:
        return checkpoints(folder)
    return [latest, *(path for path in checkpoints(folder, iteration_of(latest)) if path != latest)]


def _first_good(
    candidates: list[Path], faults: Callable[[Path], list[str]], settings: CheckpointConfig
) -> tuple[Path | None, list[str]]:
    """(the first without a fault, why those before it were passed over). CheckpointError where all have one."""
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
    """What speaks against loading a checkpoint: sizes of all files, and hashes of those selected."""
    if not path.is_dir():
        return [f"{path.name} is missing"]
    if executes_nothing(path):
        return []
    if not (path / MANIFEST).is_file():
        if settings.allow_unverified_checkpoint:
            return []
        return [
            f"it has no {MANIFEST}, so what loading it would execute cannot be verified; "
            "give --allow-unverified-checkpoint if you trust it"
        ]
    try:
        manifest = read_manifest(path)
    except (CheckpointError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return [f"{MANIFEST} is damaged"]
    return size_faults(path, manifest) or hash_faults(path, manifest, selection(manifest))


def _small_files(manifest: Manifest) -> list[str]:
    """The files that are looked at before anything is allocated; hashing them takes no time."""
    return [name for name in manifest if name.endswith(".json")]
