"""A transformers model without weights, and its weights, which come layer by layer.

A model is built on the host with parameters that have a shape and no memory, and buffers that have their values. Its
parameters are then created one layer after the other, so that ZeRO-3 can partition each layer before the next is there:
DeepSpeed partitions the parameters that a module has when its constructor is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron.hf.inspection import decoder_layers
from megatron.model.initialization import Initialization

_RANK_OF_STACK = 3  # [experts, outputs, inputs]


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the causal language model of a configuration, in its own dtype by default; parameters are on meta.

    What transformers loads in fp32 is a buffer here if nothing trains it, as DeepSpeed rounds all parameters: such are
    the corrections of routers' scores, which some models have as frozen parameters.
    """
    with _NewOnMeta(), _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    exact = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in [*model.named_parameters()]:
        if not parameter.requires_grad and any(each in name for each in exact):
            owner, _, own = name.rpartition(".")
            del model.get_submodule(owner)._parameters[own]
            model.get_submodule(owner).register_buffer(own, torch.zeros(parameter.shape))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and any(each in name for each in exact):
            buffer.data = buffer.data.float()
    return model


@torch.no_grad()
def materialize(model: PreTrainedModel, initialization: Initialization, random: bool) -> None:
    """Create the parameters of an empty model, and move its buffers to the same device.

    Their values are those that transformers starts training with, the same on every rank and at every ZeRO stage; or
    arbitrary if not `random`, as before weights are loaded.
    """
    device = initialization.device
    created: dict[int, nn.Parameter] = {}  # tied parameters are one
    layers, owners = set(decoder_layers(model)), _owners(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(initialization.seed)
        for part in _parts(model, layers):
            modules = [*part.modules()] if part in layers else [part]
            known = len(created)
            _create_parameters(modules, device, created)
            # A module whose only weight is tied has nothing of its own to initialize.
            for module in modules[::-1] if random and len(created) > known else ():
                owners[module]._init_weights(module)
            _Constructed([parameter for module in modules for parameter in module.parameters(recurse=False)])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


class _Constructed(nn.Module):
    """Has parameters when its constructor is over."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters):
            self.register_parameter(str(number), parameter)


def _create_parameters(modules: list[nn.Module], device: torch.device, created: dict[int, nn.Parameter]) -> None:
    for module in modules:
        for name, empty in module.named_parameters(recurse=False):
            if id(empty) not in created:
                values = torch.empty(empty.shape, dtype=empty.dtype, device=device)
                created[id(empty)] = nn.Parameter(values, empty.requires_grad)
            module._parameters[name] = created[id(empty)]


def _parts(module: nn.Module, layers: set[nn.Module]) -> Iterator[nn.Module]:
    """Return the layers, and the modules with parameters outside of them one by one."""
    if module in layers or any(True for _ in module.parameters(recurse=False)):
        yield module
    for child in module.children() if module not in layers else ():
        yield from _parts(child, layers)


def _owners(model: PreTrainedModel) -> dict[nn.Module, PreTrainedModel]:
    """Return the innermost model of transformers that each module is a part of: it initializes the module."""
    models = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    return {part: each for each in models for part in each.modules()}


class _NewOnMeta(TorchFunctionMode):
    """Creates what is to become a parameter without memory: tensors without values, and stacks of zeros for experts."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        how = kwargs or {}
        size = args[0] if args and isinstance(args[0], Sequence) else args
        if function is torch.empty or (function is torch.zeros and len(size) == _RANK_OF_STACK):
            how = {**how, "device": "meta"}
        return function(*args, **how)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules register parameters without memory in place of those that they create."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore
