"""QLoRA: the weights of a model with adapters in NF4 (megatron.hf.nf4), quantized as they are read from the folder.

model.layers.0.self_attn.q_proj.base_layer.weight.quantized     model.layers.0.self_attn.q_proj.weight of the folder

The linear layers of all blocks are quantized, adapted or not, and the stacks of experts. The embedding, the output
layer, routers, norms, biases and the adapters are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron.config import ConfigError
from megatron.config.packages import require_package
from megatron.hf.adapters import is_of_adapter, name_in_base
from megatron.hf.inspection import decoder_layers
from megatron.hf.nf4 import NF4Weight, dequantize, quantize
from megatron.hf.products import TAPED, put_on_tape
from megatron.weights.source import WEIGHTS, StateSource

_QUANTIZED = ".quantized"


def quantize_base(model: PreTrainedModel) -> None:
    """Put NF4 in place of the frozen weights of a model with adapters; their values come from a QuantizedSource.

    ConfigError for experts that are not a stack which runs as a grouped product, and for adapters of a stack.
    """
    for module, name in [*weights_to_quantize(decoder_layers(model))]:
        setattr(module, name, NF4Weight(module._parameters.pop(name)))  # type: ignore[arg-type]
    put_on_tape(decoder_layers(model))  # which runs their products


def weights_to_quantize(layers: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of one or all decoder layers that have weights to quantize, and the names of these in them.

    ConfigError as of `quantize_base`.
    """
    for name, module in layers.named_modules():
        if isinstance(module, ParamWrapper):
            raise ConfigError(
                f"--lora-target-modules names a stack of experts ({module.parameter_name}), and adapters of a stack "
                "are added to weights that --quantize-base quantizes; adapt linear layers alone"
            )
        if type(module) in TAPED and not is_of_adapter(name):
            if "experts" in name.split("."):
                raise _unknown_experts(name)
            yield module, "weight"
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                if not hasattr(module, "is_concatenated"):
                    raise _unknown_experts(f"{name}.{own}")
                yield module, own


def check_quantization(device: torch.device) -> None:
    """Raise ConfigError unless bitsandbytes is installed and quantizes on the device."""
    require_package("bitsandbytes", "--quantize-base")
    weight = torch.zeros(64, device=device)
    try:
        dequantize(quantize(weight), weight.shape, torch.bfloat16)
    except Exception as error:  # of bitsandbytes, whose libraries may be those of another machine
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--quantize-base (nf4): the installed bitsandbytes cannot quantize on {device.type} ({reason}); install a "
            "version for this machine, or train without --quantize-base"
        ) from error


class QuantizedSource:
    """A StateSource of a folder's weights, those in NF4 under the name of their parameter of bytes.

    The names without `.quantized` can be read too: dequantized.
    """

    step: int | None = None
    loss_scale: Mapping[str, float] = {}

    def __init__(self, model: nn.Module, base: StateSource, device: torch.device) -> None:
        """Take the `base` of a model that `quantize_base` has changed; weights are quantized on the `device`."""
        self._base, self._device = base, device
        modules = ((name_in_base(name), module) for name, module in model.named_modules())
        self._weights = {name: module for name, module in modules if isinstance(module, NF4Weight)}
        self._held: tuple[str, Tensor] | None = None

    @property
    def names(self) -> Sequence[str]:
        return [name + _QUANTIZED if name in self._weights else name for name in self._base.names]

    def shape(self, name: str) -> tuple[int, ...]:
        owner = name.removesuffix(_QUANTIZED)
        if owner == name or owner not in self._weights:
            return self._base.shape(name)
        parameter: Any = self._weights[owner].quantized
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name.endswith(_QUANTIZED) else self._base.dtype(name)

    def get(self, name: str) -> Tensor:
        owner = name.removesuffix(_QUANTIZED)
        if owner not in self._weights:
            return self._base.get(name)
        stored, weight = self._quantized(owner), self._weights[owner]
        return stored if name != owner else dequantize(stored, weight.shape, weight.dtype)

    def parts(self, name: str) -> Sequence[str]:
        return (WEIGHTS,)

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        if name.removesuffix(_QUANTIZED) not in self._weights:
            return self._base.read(name, part, start, count)
        return self.get(name).flatten()[start : start + count]

    def _quantized(self, owner: str) -> Tensor:
        """Quantize one weight of the folder, in the number format of the run; the last one is held."""
        if self._held is None or self._held[0] != owner:
            self._held = None
            weight = self._base.get(owner).to(self._device, self._weights[owner].dtype)
            self._held = owner, quantize(weight)
        return self._held[1]


def _unknown_experts(name: str) -> ConfigError:
    return ConfigError(
        f"--quantize-base (nf4) does not quantize {name} of a layer, which the model's own code multiplies with; train "
        "adapters without --quantize-base"
    )
