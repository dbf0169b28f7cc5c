"""Checks before anything is allocated: tokenizer, data, checkpoint, schedule, kernel and output folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.checkpointing import check_checkpoint, find_checkpoint, saved_state
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, ConfigError, sample_lengths
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.output_names import check_output_name
from megatron.data.splits import parse_data_paths
from megatron.data.vocabulary import check_document_ends, check_vocabulary
from megatron.fpdt.disk_files import check_folder
from megatron.initialize import device_type, number_format
from megatron.logging.writers import require_writer_packages
from megatron.model.layers import attention_request, has_short_tiles
from megatron.ops.attention import choose_backend
from megatron.optimizer.schedule import LearningRateSchedule
from megatron.tokenizer import Tokenizer, tokenizer_of
from megatron.training.lengths import Lengths
from megatron.weights.published_config import has_weights
from megatron.weights.safetensors_folder import check_new

DataCheck = Callable[[Config, Tokenizer], None]


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary size and end-of-document id that the model and the batches need."""

    padded_size: int
    """Rows of the embedding."""

    end_of_document: int
    """The id that ends a document."""


def check_inputs(config: Config, world_size: int, check_data: DataCheck) -> Vocabulary:
    """Check all inputs, the data with `check_data`, and return the vocabulary. Writes nothing.

    Raises ConfigError, TokenizerError, DataError, CheckpointError, WeightsError, DiskError or
    AttentionUnavailable.
    """
    model = config.model
    checkpoint = find_checkpoint(config.checkpoint)
    state = TrainState() if checkpoint is None else saved_state(checkpoint, config)
    state.start(sample_lengths(config, world_size))
    LearningRateSchedule.from_config(config.optimizer, config.training, Lengths.of(config, world_size, state).course)
    device, dtype = torch.device(device_type()), number_format(config)
    request = attention_request(model, device, dtype)
    num_ranks, documents = config.parallel.ds_sequence_parallel_size, config.data.reset_attention_mask
    choose_backend(model.attention_backend, request, has_short_tiles(model, num_ranks, documents))
    tokenizer = tokenizer_of(config.tokenizer)
    check_data(config, tokenizer)
    padded_vocab_size = model.num_rows(tokenizer.vocab_size)
    if tokenizer.eod >= padded_vocab_size:
        raise ConfigError(
            f"the tokenizer ends a document with id {tokenizer.eod}, and the model of --hf-model ({model.hf_model}) "
            f"has {padded_vocab_size} ids; use the tokenizer of the model"
        )
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, world_size, padded_vocab_size)
    check_output_folders(config)
    for folder in config.parallel.ds_sequence_parallel_fpdt_disk or ():
        check_folder(folder)
    if config.adapters.is_used and not has_weights(Path(model.hf_model or "")):
        raise ConfigError(
            f"--hf-model ({model.hf_model}) has no weights, and adapters are trained on frozen weights; copy the whole "
            "folder"
        )
    if config.adapters.quantize_base is not None:
        from megatron.hf.quantization import check_quantization  # imports peft

        check_quantization(device)
    if checkpoint is None and model.hf_model is not None and has_weights(Path(model.hf_model)):
        from megatron.hf.weights import folder_source  # imports transformers, which native models do not need

        folder_source(Path(model.hf_model))  # raises unless its weights can be loaded
    require_writer_packages(config.logging)
    return Vocabulary(padded_vocab_size, tokenizer.eod)


def data_paths(config: Config) -> tuple[tuple[str, ...], ...]:
    """Return the values of the flags that name data."""
    data = config.data
    return data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path


def check_indexed_data(config: Config, tokenizer: Tokenizer) -> None:
    """Raise DataError unless the data are complete datasets whose tokens are in the vocabulary."""
    for paths in data_paths(config):
        for prefix in parse_data_paths(paths)[0] if paths else ():
            indexed = IndexedDataset(prefix)
            check_vocabulary(indexed, min(tokenizer.vocab_size, config.model.num_rows(tokenizer.vocab_size)))
            if config.data.separates_documents:
                check_document_ends(indexed, tokenizer.eod)


def check_output_folders(config: Config) -> None:
    """Raise an error unless every output folder can be written, and that of --save-hf will still be empty at the end.

    Creates nothing. The errors are those of `check_writable`, and WeightsError for --save-hf.
    """
    named = {
        "--save": config.checkpoint.save,
        "--tensorboard-dir": config.logging.tensorboard_dir,
        "--profile-dir": config.logging.profile_dir,
        "--save-hf": config.checkpoint.save_hf,
    }
    folders = {flag: Path(folder) for flag, folder in named.items() if folder is not None}
    for flag, folder in folders.items():
        check_writable(flag, folder)
    exported = folders.pop("--save-hf", None)
    if exported is None:
        return
    check_new(exported, "--save-hf")
    for flag, folder in folders.items():
        if exported.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ConfigError(
                f"--save-hf ({exported}) must be a folder of its own, and {flag} ({folder}) is written to it during "
                f"training; use for example --save-hf {exported / 'hf'}"
            )


def check_writable(flag: str, folder: Path) -> None:
    """Raise ConfigError, or DataError for its name, unless `folder` can be written or created. Creates nothing."""
    check_output_name(folder, flag)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "cannot be written" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"{flag} ({folder}): {existing} {reason}; name a folder that can be written.")
