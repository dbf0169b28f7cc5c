"""Saving: a checkpoint gets its name once all its files are on the disk; then `latest` is updated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron.checkpointing.adapters import base_digest
from megatron.checkpointing.agreement import on_all_ranks, on_first_rank
from megatron.checkpointing.compatibility import Layout
from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.files import write_json, write_text
from megatron.checkpointing.folder import (
    checkpoint_path,
    delete_retired,
    delete_unfinished,
    keep_newest,
    retire,
    unfinished_path,
    write_latest,
)
from megatron.checkpointing.random_state import random_state_path, write_random_state
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config
from megatron.config.settings_file import SETTINGS_FILE, settings_text
from megatron.core.atomic_file import flush_to_disk
from megatron.engine.engine import Engine
from megatron.initialize import GIB, Context
from megatron.weights.errors import first_line
from megatron.weights.manifest import Manifest, describe_files, size_faults, write_manifest
from megatron.weights.published_config import BASE_FILE, PUBLISHED_FILE, read_published_config


class Saver:
    """Writes the checkpoints of one run."""

    def __init__(self, engine: Engine, context: Context, config: Config, padded_vocab_size: int) -> None:
        self._engine, self._context, self._config = engine, context, config
        self._padded_vocab_size = padded_vocab_size
        hf_model = config.model.hf_model
        self._published = None if hf_model is None else read_published_config(Path(hf_model))
        self.size_bytes = 0
        """Size of the checkpoint that was written last; 0 before the first."""

    def save(self, folder: Path, state: TrainState) -> Path:
        """Write a checkpoint and make it the latest. Collective over all ranks.

        CheckpointError on every rank where one rank fails: the new files are removed; earlier checkpoints and `latest`
        are unchanged.
        """
        path = checkpoint_path(folder, state.iteration)
        unfinished = on_first_rank(lambda: unfinished_path(path))
        try:
            on_first_rank(lambda: self._start(unfinished))
            manifests = on_all_ranks(lambda: self._write(unfinished, state))
            manifest = {name: entry for part in manifests for name, entry in part.items()}
            on_first_rank(lambda: self._publish(unfinished, path, manifest))
        except CheckpointError as error:
            on_first_rank(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            raise CheckpointError(
                f"the checkpoint {path} cannot be saved: {error}; earlier ones are intact: free disk space or "
                f"fix the folder, and resume from them with --load {folder}."
            ) from error
        self.size_bytes = sum(entry.size_bytes for entry in manifest.values())
        if self._context.is_first_rank:
            self._delete_old_ones(folder, state.iteration)
        return path

    def export(self, folder: Path) -> None:
        """Write the weights of a Hugging Face model as a folder that `from_pretrained` loads.

        Collective over all ranks. CheckpointError on every rank where it cannot be written.
        """
        from megatron.checkpointing.hugging_face import save_adapters, save_hugging_face  # imports transformers

        base, published = Path(self._config.model.hf_model or ""), self._published or {}
        try:
            if self._config.adapters.is_used:
                save_adapters(self._engine, self._config.adapters, published, base, folder)
            else:
                save_hugging_face(self._engine, published, folder, base)
        except CheckpointError as error:
            raise CheckpointError(
                f"--save-hf ({folder}) cannot be written: {error} A checkpoint of --save can be converted with "
                "tools/hf2megads_weight_converter.py to-hf."
            ) from error

    def _start(self, unfinished: Path) -> None:
        folder = unfinished.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._tolerate(lambda: delete_unfinished(folder), f"what an earlier save left in {folder}")
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < self.size_bytes:
            raise CheckpointError(
                f"{folder} has {free_bytes / GIB:.3g} GiB free, and the last checkpoint took "
                f"{self.size_bytes / GIB:.3g} GiB"
            )
        unfinished.mkdir()

    def _write(self, unfinished: Path, state: TrainState) -> Manifest:
        """Write this rank's files, and describe them once they are on the disk. Collective over all ranks."""
        adapters = self._config.adapters.is_used
        written = self._engine.save(unfinished.parent, unfinished.name, with_frozen=not adapters)
        random_state = random_state_path(unfinished, self._context)
        write_random_state(random_state, self._context)
        written.append(random_state)
        if self._context.is_first_rank:
            layout = Layout.of(self._config, self._context.parallel_state.world_size, self._padded_vocab_size)
            contents = {
                "config.json": self._config.to_dict(),
                "layout.json": asdict(layout),
                "train_state.json": state.to_dict(),
            }
            if self._published is not None:
                contents[PUBLISHED_FILE] = self._published
            if adapters:
                contents[BASE_FILE] = {"digest": base_digest(self._config)}
            for name, content in contents.items():
                written.append(unfinished / name)
                write_json(written[-1], content)
            written.append(unfinished / SETTINGS_FILE)
            write_text(written[-1], settings_text(self._config))
        return describe_files(unfinished, written)

    def _publish(self, unfinished: Path, path: Path, manifest: Manifest) -> None:
        faults = size_faults(unfinished, manifest)
        if faults:
            raise CheckpointError(f"{faults[0]} for rank 0; --save must name a folder that all machines share")
        write_manifest(unfinished, manifest)
        for folder in {(unfinished / name).parent for name in manifest} | {unfinished}:
            flush_to_disk(folder)
        if os.path.lexists(path):  # a dangling link counts, too
            retire(path)
        os.rename(unfinished, path)
        flush_to_disk(path.parent)
        write_latest(path.parent, path)

    def _delete_old_ones(self, folder: Path, iteration: int) -> None:
        """Delete the checkpoints beyond --keep-last-n-checkpoints, now that the new one is complete."""
        count = self._config.checkpoint.keep_last_n_checkpoints
        if count is not None:
            self._tolerate(lambda: keep_newest(folder, iteration, count), f"an old checkpoint in {folder}")
        self._tolerate(lambda: delete_retired(folder), f"an old checkpoint in {folder}")

    def _tolerate(self, delete: Callable[[], None], what: str) -> None:
        """Delete, with a warning on failure: it costs space, but no checkpoint."""
        try:
            delete()
        except OSError as error:
            self._context.log.warning("%s cannot be deleted: %s", what, first_line(error))
