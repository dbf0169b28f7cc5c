"""Settings of adapters: those that a folder of peft states, and the sizes that the planner needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron.config import AdaptersConfig, AdapterSizes, ConfigError
from megatron.core.json_text import parse_object
from megatron.fpdt.layer_trace import FEW_INPUTS
from megatron.hf.adapters import ALL_LINEAR, add_adapters
from megatron.hf.inspection import decoder_layers
from megatron.hf.quantization import weights_to_quantize

CONFIG_FILE = "adapter_config.json"
_TAKEN = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "use_dora")
# What does not change how the adapters compute, once they have values.
_FREE = (
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("init_lora_weights", "fan_in_fan_out", "peft_version", "runtime_config", "loftq_config", "megatron_core"),
)
# Ways to begin that leave the weights of the model as they are.
_INITIAL = (True, False, "gaussian", "orthogonal")


def with_settings_of_folder(settings: AdaptersConfig) -> AdaptersConfig:
    """Return the settings with those of the folder of --load-adapter, where it is given.

    ConfigError if it is no folder of LoRA, or its adapters compute otherwise than those that are trained here.
    """
    if settings.load_adapter is None:
        return settings
    file = Path(settings.load_adapter) / CONFIG_FILE
    try:
        content = parse_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--load-adapter ({settings.load_adapter}) has no {CONFIG_FILE} that can be read ({error}); name the "
            "folder of an adapter that peft saved"
        ) from error
    _refuse_others(content, file)
    modules = content.get("target_modules") or ()
    if isinstance(modules, str) and modules != ALL_LINEAR:
        raise ConfigError(f"{file} has a pattern for target_modules ({modules}); write the list of names in its place")
    modules = (ALL_LINEAR,) if isinstance(modules, str) else modules
    return replace(
        settings,
        lora_rank=int(content["r"]),
        lora_alpha=float(content["lora_alpha"]),
        lora_dropout=float(content.get("lora_dropout", 0.0)),
        lora_target_modules=tuple(sorted((*modules, *(content.get("target_parameters") or ())))),
        use_dora=bool(content.get("use_dora", False)),
    )


def _refuse_others(content: Mapping[str, Any], file: Path) -> None:
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{file} is of {kind}, and only LORA is trained here; use such an adapter")
    plain = LoraConfig().to_dict()
    for name, value in content.items():
        if name not in (*_TAKEN, *_FREE) and value not in (None, False, [], {}, plain.get(name)):
            raise ConfigError(
                f"{file} sets {name} ({value}), which is not supported; train adapters with rank, scale, dropout, "
                "targets and DoRA alone"
            )
    initial = content.get("init_lora_weights", True)
    if initial not in _INITIAL:
        raise ConfigError(
            f"{file} sets init_lora_weights ({initial}), which changes the weights of the model; convert the adapter "
            "to a plain one with peft first"
        )


def adapter_sizes(theirs: PretrainedConfig, settings: AdaptersConfig) -> AdapterSizes:
    """Count the adapters of a model, from its configuration alone. ConfigError if they do not fit it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    add_adapters(model, settings)
    layers = [_layer_sizes(layer, model.config.get_text_config().hidden_size) for layer in decoder_layers(model)]
    quantized = [_quantized_sizes(layer) for layer in decoder_layers(model)] if settings.quantize_base else [[0]]
    return AdapterSizes(
        weights=sum(each.weights for each in layers),
        block_weights=max(each.block_weights for each in layers),
        saved_outputs=max(each.saved_outputs for each in layers),
        outputs=max(each.outputs for each in layers),
        added_stacks=max(each.added_stacks for each in layers),
        quantized_weights=sum(map(sum, quantized)),
        quantized_block_weights=max(map(sum, quantized)),
        largest_quantized=max(map(max, quantized)),
    )


def _quantized_sizes(layer: nn.Module) -> list[int]:
    return [module.get_parameter(name).numel() for module, name in weights_to_quantize(layer)]


def _layer_sizes(layer: nn.Module, hidden_size: int) -> AdapterSizes:
    weights = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    saved = outputs = stacks = 0
    for module in layer.modules():
        if isinstance(module, ParamWrapper):
            stacks += module.get_param().numel()
        elif isinstance(module, LoraLayer):
            (rank,), width, inputs = module.r.values(), module.out_features or 0, module.in_features or 0
            saved += rank + (width if FEW_INPUTS * rank > hidden_size else 0)
            # DoRA's gradient reads the outputs of the base and of the adapter; dropout copies its input.
            copies = 3 if any(module.use_dora.values()) else 1
            drops = any(isinstance(each, nn.Dropout) for each in module.lora_dropout.values())
            outputs += copies * width + 2 * inputs * drops
    return AdapterSizes(
        weights=weights, block_weights=weights, saved_outputs=saved, outputs=outputs, added_stacks=stacks
    )
