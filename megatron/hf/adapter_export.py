"""Folders of trained adapters: peft's own, or the whole model with the adapters merged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from megatron.config import AdaptersConfig
from megatron.core.atomic_file import flush_to_disk, publish, temporary_path
from megatron.hf.adapter_weights import ADAPTER_FILE, MergedSource, name_in_file
from megatron.hf.adapters import add_adapters, lora_config
from megatron.hf.empty_model import build_empty, config_of
from megatron.hf.export import Target, save_folder
from megatron.hf.weights import folder_source
from megatron.weights.safetensors_folder import check_new


def write_trained(
    adapter: Mapping[str, Tensor], settings: AdaptersConfig, published: Mapping[str, Any], base: Path, folder: Path
) -> None:
    """Write adapters, by name in the model that `published`, a config.json, describes, as `settings` ask.

    Merged weights are those in the folder `base`. WeightsError if the folder to write exists and is not empty.
    """
    model = build_empty(config_of(published))
    if not settings.merge_adapter:
        write_adapter(adapter, lora_config(model, settings), folder, base)
        return
    add_adapters(model, settings)
    save_folder(MergedSource(model, folder_source(base), adapter), published, Target(folder, beside=(base,)))


def write_adapter(adapter: Mapping[str, Tensor], config: LoraConfig, folder: Path, base: Path) -> None:
    """Write adapters, by name in the model, as the folder that peft loads onto the model in `base`.

    WeightsError if the folder exists and is not empty.
    """
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = temporary_path(folder)
    staging.mkdir()
    try:
        config.base_model_name_or_path = str(base)
        config.inference_mode = True
        config.save_pretrained(str(staging))
        tensors = {name_in_file(name): tensor.contiguous() for name, tensor in adapter.items()}
        save_file(tensors, staging / ADAPTER_FILE, {"format": "pt"})
        for file in staging.iterdir():
            flush_to_disk(file)
        if folder.exists():
            folder.rmdir()
        publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
