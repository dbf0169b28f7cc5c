"""Low-rank adapters in a transformers model, by peft; all other weights are frozen.

    LoRA    y = W x + s B A dropout(x)                         s = alpha / rank
    DoRA    y = m / |W + s B A| * (W x + s B A x)              the norm of each row is a constant to autograd

peft's modules run as they are: A and B are linear layers, whose products are on the tape like any other's. Adapters of
a stack of experts (`target_parameters`) add s B A to the stack whenever the experts run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from megatron.config import AdaptersConfig, ConfigError
from megatron.hf.inspection import decoder_layers

ALL_LINEAR = "all-linear"
# The name of the only adapter, which peft makes a part of its parameters' names.
ADAPTER = "default"
# Where peft puts the module that it adapts.
_BASE = "base_layer"
_LINEAR = (nn.Linear, Conv1D)


def add_adapters(model: PreTrainedModel, settings: AdaptersConfig) -> None:
    """Freeze a model and give it adapters, on the devices and in the number formats of its parameters.

    ConfigError if the settings do not fit the model.
    """
    config = lora_config(model, settings)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
            inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=_is_empty(model))
    except ValueError as error:  # of peft, such as for dropout with experts
        raise ConfigError(f"peft cannot give {type(model).__name__} these adapters: {error}; change them") from error


def lora_config(model: PreTrainedModel, settings: AdaptersConfig) -> LoraConfig:
    """Return peft's configuration of the adapters of a model; ConfigError for targets that it does not have."""
    modules, parameters = find_targets(model, settings.lora_target_modules or (ALL_LINEAR,))
    return LoraConfig(
        r=settings.lora_rank or 0,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
    )


def find_targets(model: PreTrainedModel, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of linear layers and of weights of other modules that `names` are; each in order.

    ConfigError for a name that no linear layer and no such weight of the decoder layers ends with.
    """
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    linear = [f"{prefix}.{name}" for name, module in layers.named_modules() if isinstance(module, _LINEAR)]
    weights = [f"{prefix}.{name}" for name in _weights_of_other_modules(layers)]
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    for name in names:
        if name == ALL_LINEAR:
            ends = dict.fromkeys(each.rsplit(".", 1)[1] for each in linear)
            modules |= dict.fromkeys(end for end in ends if not _means_experts(model, end))
        elif any(_ends_with(each, name) for each in linear):
            _refuse_names_of_experts(model, name)
            modules[name] = None
        elif any(_ends_with(each, name) for each in weights):
            parameters[name] = None
        else:
            raise ConfigError(
                f"--lora-target-modules ({name}) names nothing in the layers of {type(model).__name__}; its linear "
                f"layers are {', '.join(_ends(linear))}"
                + f", other weights {', '.join(_ends(weights))}"
                * bool(weights)
            )
    inside = {*linear, *weights}
    everything = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    for name in (name for name in everything if name not in inside):
        if any(_ends_with(name, each) for each in modules):
            raise ConfigError(f"--lora-target-modules names {name}, which is outside of the layers; use longer names")
    return list(modules), list(parameters)


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of a model with adapters belongs to them, by its name."""
    return any(part.startswith("lora_") for part in name.split("."))


def name_in_base(name: str) -> str:
    """Return the name that a parameter has in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != _BASE)


def _means_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether peft takes the name of a linear layer for the experts', which are a stack in today's transformers."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of several names
        return True
    return name not in (config.target_modules or ())


def _refuse_names_of_experts(model: PreTrainedModel, name: str) -> None:
    if _means_experts(model, name):
        raise ConfigError(
            f"--lora-target-modules ({name}) means the experts to peft, not the linear layers of this name in "
            f"{type(model).__name__}; remove it, or name the experts' weights, such as experts.gate_up_proj"
        )


def _weights_of_other_modules(layers: nn.Module) -> Iterator[str]:
    """Yield the names of matrices and stacks that modules other than linear layers have."""
    for name, module in layers.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and not isinstance(module, _LINEAR):
                yield f"{name}.{own}"


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _ends(names: Sequence[str]) -> list[str]:
    """Return the last two parts of names, once each."""
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def _is_empty(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta
