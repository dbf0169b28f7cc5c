"""Open a model by its path: weights of any kind, and the configuration next to them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron.model.transformer import GPTModel
from megatron.weights.hugging_face import HuggingFaceWeights, check_ours, num_rows
from megatron.weights.megatron_deepspeed import MegatronDeepSpeedCheckpoint, is_megatron_deepspeed
from megatron.weights.opening import newest_checkpoint, open_state
from megatron.weights.portable_config import CONFIG_FILE, PortableConfig, read_json, refuse_hugging_face_model
from megatron.weights.source import WeightSource


def open_model(path: Path, with_hashes: bool = True) -> tuple[PortableConfig, WeightSource]:
    """Open a model, reading no tensor: portable weights, a training checkpoint, or a Hugging Face folder.

    A checkpoint may have any layout, or be one of upstream's Megatron-DeepSpeed; `path` may be the folder of `latest`.
    Files with a manifest are verified as `open_state` does.

    Raises:
        WeightsError: there is no such model, it is not supported, or its files differ from the manifest.
    """
    path = newest_checkpoint(path)
    if _is_hugging_face(path):
        theirs = HuggingFaceWeights(path)
        return theirs.portable, theirs
    if is_megatron_deepspeed(path) and not (path / CONFIG_FILE).is_file():
        upstream = MegatronDeepSpeedCheckpoint(path)
        return upstream.config(), upstream
    refuse_hugging_face_model(path)
    source = open_state(path, with_hashes)
    return PortableConfig.read(path, num_rows(source)), source


def _is_hugging_face(path: Path) -> bool:
    config = path / CONFIG_FILE
    return config.is_file() and "model_type" in read_json(config)


@torch.no_grad()
def fill_model(model: GPTModel, portable: PortableConfig, source: WeightSource) -> None:
    """Copy the weights into a model of the same architecture, one parameter at a time.

    WeightsError, before anything is copied, if one is absent, unknown or of another shape.
    """
    check_ours(source, portable)
    for name, parameter in model.named_parameters():
        parameter.copy_(source.get(name))
