"""Portable weights: safetensors under this package's parameter names, with the model's config.json and a manifest.

They do not belong to a run: training starts from them at iteration 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.config import ModelConfig, describe_mismatch
from megatron.weights.errors import WeightsError
from megatron.weights.portable_config import CONFIG_FILE, model_of, read_json, refuse_hugging_face_model
from megatron.weights.safetensors_folder import DEFAULT_MAX_SHARD_BYTES, SafetensorsFolder, SafetensorsWriter
from megatron.weights.source import WeightSource

_EMBEDDING = "embedding.word_embeddings.weight"


def write_portable(
    source: WeightSource,
    companions: Sequence[Path],
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    report: Callable[[str], None] = lambda name: None,
) -> None:
    """Write every tensor of `source` to a new folder, one at a time, and cast floating-point ones to `dtype` if given.

    `companions` are files to copy into the folder, where they exist. `report` is called with each name before its
    tensor is read. WeightsError if something is at `folder` already.
    """
    with SafetensorsWriter(folder, max_shard_bytes, with_manifest=True) as writer:
        for file in companions:
            if file.is_file():
                shutil.copyfile(file, writer.staging / file.name)
        for name in source.names:
            report(name)
            writer.add(name, _in_dtype(source.get(name), dtype))


def check_portable(path: Path, model: ModelConfig, padded_vocab_size: int, change_rope: bool = False) -> None:
    """Raise WeightsError if the weights at `path` have another architecture or vocabulary. Reads no tensor."""
    refuse_hugging_face_model(path)
    saved = _saved_model(path)
    mismatch = describe_mismatch(saved, model, change_rope) if saved is not None else ""
    if mismatch:
        raise WeightsError(
            f"the weights in {path} are of another model: {mismatch}; pass the flags of theirs (they are in "
            f"{path / CONFIG_FILE}), or point --load elsewhere."
        )
    weights = SafetensorsFolder(path)
    if _EMBEDDING not in weights:
        raise WeightsError(
            f"{path} has no tensor {_EMBEDDING}: its names are not those of this package; convert it to them first."
        )
    rows = weights.shape(_EMBEDDING)[0]
    if rows != padded_vocab_size:
        raise WeightsError(
            f"the weights in {path} have {rows} rows in their embedding, and the tokenizer and "
            f"--make-vocab-size-divisible-by ask for {padded_vocab_size}; use the tokenizer they were trained with."
        )


def _saved_model(path: Path) -> ModelConfig | None:
    """Read the model in the config.json next to the weights; None without one or if another program wrote it."""
    if not (path / CONFIG_FILE).is_file():
        return None
    saved = read_json(path / CONFIG_FILE).get("model")
    try:
        return model_of(saved) if isinstance(saved, dict) else None
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path / CONFIG_FILE} is incomplete ({error}); copy it again, or remove it.") from error


def _in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
