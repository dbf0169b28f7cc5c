"""Sources of the weights of a model with adapters: the base from its folder, the adapters from elsewhere.

model.layers.0.self_attn.q_proj.base_layer.weight          model.layers.0.self_attn.q_proj.weight of the folder
model.layers.0.self_attn.q_proj.lora_A.default.weight      initial values, peft's folder, or a checkpoint
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Size, Tensor, nn
from transformers.pytorch_utils import Conv1D

from megatron.hf.adapters import ADAPTER, is_of_adapter, name_in_base
from megatron.weights.errors import WeightsError
from megatron.weights.parameters import owned_tensors, whole_shape
from megatron.weights.safetensors_folder import SafetensorsFolder
from megatron.weights.source import WEIGHTS, StateSource

ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapters' parameters, by name in the model."""
    return {name: whole_shape(p) for name, p in model.named_parameters() if is_of_adapter(name)}


def name_in_file(name: str) -> str:
    """Return peft's name in a file for an adapter's parameter."""
    return _PREFIX + name.replace(f"{_MAGNITUDE}.{ADAPTER}.weight", _MAGNITUDE).replace(f".{ADAPTER}.", ".")


class AdaptedSource:
    """The StateSource of a model with adapters."""

    def __init__(self, model: nn.Module, base: StateSource, adapter: StateSource) -> None:
        """Take the `base` under the names without adapters, and the `adapter` under its names in `model`.

        WeightsError if the adapter has not exactly the parameters that the model's adapters have.
        """
        names = owned_tensors(model)
        _check_adapter(adapter_shapes(model), adapter)
        self._places = {name: (adapter, name) for name in names if is_of_adapter(name)}
        self._places |= {name: (base, name_in_base(name)) for name in names if not is_of_adapter(name)}
        self._adapter = adapter

    @property
    def names(self) -> Sequence[str]:
        return list(self._places)

    @property
    def step(self) -> int | None:
        return self._adapter.step

    @property
    def loss_scale(self) -> Mapping[str, float]:
        return self._adapter.loss_scale

    def shape(self, name: str) -> tuple[int, ...]:
        source, own = self._places[name]
        return source.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        source, own = self._places[name]
        return source.dtype(own)

    def get(self, name: str) -> Tensor:
        source, own = self._places[name]
        return source.get(own)

    def parts(self, name: str) -> Sequence[str]:
        source, own = self._places[name]
        return source.parts(own)

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        source, own = self._places[name]
        return source.read(own, part, start, count)


class _WeightsAlone(ABC):
    """A StateSource without moments over whole tensors, of which the last one is held."""

    step: int | None = None
    loss_scale: Mapping[str, float] = {}
    _held: tuple[str, Tensor] | None = None

    def get(self, name: str) -> Tensor:
        if self._held is None or self._held[0] != name:
            self._held = None
            self._held = name, self.whole(name)
        return self._held[1]

    @abstractmethod
    def whole(self, name: str) -> Tensor:
        """Return a whole tensor."""

    def parts(self, name: str) -> Sequence[str]:
        return (WEIGHTS,)

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        assert part == WEIGHTS, "a source without a step has no moments"
        return self.get(name).flatten()[start : start + count]


class InitialAdapter(_WeightsAlone):
    """Values to start with, as peft draws them: A uniform, B zero, DoRA's magnitudes those of the base.

    They depend on the seed and the name alone, so every rank computes the same.
    """

    def __init__(self, model: nn.Module, base: StateSource, seed: int) -> None:
        self._base, self._seed, self._shapes = base, seed, adapter_shapes(model)
        self._transposed = {name for name, module in model.named_modules() if _is_transposed(module)}

    @property
    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def whole(self, name: str) -> Tensor:
        module, _, rest = name.partition(".lora_")
        shape = self._shapes[name]
        if rest.startswith("A."):
            digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]))
            bound = shape[1] ** -0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if rest.startswith("B."):
            return torch.zeros(shape)
        weight = self._base.get(name_in_base(f"{module}.weight"))
        return torch.linalg.norm(weight.float(), dim=0 if module in self._transposed else 1)


class SavedAdapter(_WeightsAlone):
    """The adapter in a folder that peft wrote, under the names of the model."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        """WeightsError if a tensor is missing, surplus or of another shape."""
        if not (folder / ADAPTER_FILE).is_file():
            raise WeightsError(f"{folder} has no {ADAPTER_FILE}; name the folder of an adapter that peft saved.")
        self._file = SafetensorsFolder(folder / ADAPTER_FILE)
        self._names = {name: name_in_file(name) for name in adapter_shapes(model)}
        if surplus := [name for name in self._file.names if name not in self._names.values()]:
            raise WeightsError(f"{folder} has {surplus[0]!r}, which is no adapter of this model; use its own adapters.")
        if missing := [name for name in self._names.values() if name not in self._file]:
            raise WeightsError(f"{folder} has no {missing[0]!r}; copy it again, or use the adapter of this model.")

    @property
    def names(self) -> Sequence[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._file.dtype(self._names[name])

    def whole(self, name: str) -> Tensor:
        return self._file.get(self._names[name])


class MergedSource(_WeightsAlone):
    """The base with the adapters added to its weights, by peft itself, one weight at a time."""

    def __init__(self, model: nn.Module, base: StateSource, adapter: Mapping[str, Tensor]) -> None:
        """Take an empty `model` with adapters, the `base` under its own names, and the adapters' tensors by name."""
        self._base, self._adapter = base, adapter
        modules = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        self._modules = {name_in_base(f"{name}.{_adapted_weight(module)}"): (name, module) for name, module in modules}

    @property
    def names(self) -> Sequence[str]:
        return self._base.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def whole(self, name: str) -> Tensor:
        weight = self._base.get(name)
        return self._merged(*self._modules[name], weight) if name in self._modules else weight

    @torch.no_grad()
    def _merged(self, name: str, module: Any, weight: Tensor) -> Tensor:
        """Let peft's module merge a weight; the module gets its tensors for as long as that takes."""
        values = {each: self._adapter[f"{name}.{each}"] for each in _own_adapters(module)}
        # peft computes with adapters in fp32 on a base in half precision.
        values = {each: value.float() if value.dtype.itemsize < 4 else value for each, value in values.items()}
        owner, own = module.get_base_layer(), _adapted_weight(module)
        places = [(owner, own, nn.Parameter(weight.clone(), requires_grad=False))]
        for each, value in values.items():
            parent, _, last = each.rpartition(".")
            places.append((module.get_submodule(parent), last, nn.Parameter(value, requires_grad=False)))
        empty = [(holder, last, holder._parameters[last]) for holder, last, _ in places]
        try:
            _set(places)
            module.merge(adapter_names=[ADAPTER])
            result: Tensor = getattr(owner, own).detach()
            return result
        finally:
            _set(empty)
            module.merged_adapters.clear()


def digest_of_weights(folder: Path) -> str:
    """Return a digest of the tensors of a Hugging Face folder: names, shapes, number formats, and some values each.

    It does not depend on how the tensors are distributed over files.
    """
    tensors = SafetensorsFolder(folder)
    digest = hashlib.sha256()
    for name in tensors.names:
        count = min(256, Size(tensors.shape(name)).numel())
        digest.update(f"{name} {tensors.shape(name)} {tensors.dtype(name)}".encode())
        digest.update(tensors.read(name, 0, count).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_adapter(expected: Mapping[str, tuple[int, ...]], adapter: StateSource) -> None:
    names = {name for name in adapter.names if is_of_adapter(name)}
    faults = [f"{name} is missing" for name in expected if name not in names]
    faults += [f"{name} is no adapter of this run" for name in sorted(names - set(expected))]
    faults += [
        f"{name} is {list(adapter.shape(name))}, and this run has {list(shape)}"
        for name, shape in expected.items()
        if name in names and adapter.shape(name) != shape
    ]
    if faults:
        raise WeightsError(
            f"these adapters are not those of this run: {'; '.join(faults[:3])}; use the --lora flags that they were "
            "trained with."
        )


def _adapted_weight(module: Any) -> str:
    return str(module.parameter_name) if isinstance(module, ParamWrapper) else "weight"


def _is_transposed(module: Any) -> bool:
    return isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), Conv1D)


def _own_adapters(module: nn.Module) -> list[str]:
    """Return the names of a module's adapters, without those of a module inside of it."""
    names = (name for name, _ in module.named_parameters())
    return [name for name in names if name.startswith("lora_")]


def _set(places: Sequence[tuple[nn.Module, str, nn.Parameter | None]]) -> None:
    for holder, name, parameter in places:
        holder._parameters[name] = parameter
