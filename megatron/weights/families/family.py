"""A family of Hugging Face models: the meaning of its config.json and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config import ModelConfig
from megatron.weights.errors import WeightsError
from megatron.weights.families.values import HuggingFaceConfig
from megatron.weights.rearrangement import GroupedHeads, Rearrangement, Same, Stacked, Transposed, TransposedHeads

Arrange = Callable[[ModelConfig], Rearrangement]


def same(model: ModelConfig) -> Rearrangement:
    """Take one tensor unchanged."""
    return Same()


def transposed(model: ModelConfig) -> Rearrangement:
    """Transpose one weight that is stored [in, out]."""
    return Transposed()


def gate_and_up(model: ModelConfig) -> Rearrangement:
    """Stack the two halves of SwiGLU's first layer."""
    return Stacked(2)


def grouped_heads(model: ModelConfig) -> GroupedHeads:
    """Interleave separate queries, keys and values by key/value head."""
    per_group = model.num_attention_heads // model.num_key_value_heads
    return GroupedHeads(model.num_key_value_heads, per_group, model.kv_channels)


def transposed_heads(model: ModelConfig) -> Rearrangement:
    """Rearrange GPT-2's single tensor of queries, keys and values."""
    return TransposedHeads(grouped_heads(model))


@dataclass(frozen=True)
class Module:
    """Their modules that make up one of ours; `*` is the layer number, which starts at 0 on both sides."""

    names: tuple[str, ...]
    arrange: Arrange = same


@dataclass(frozen=True)
class Needed:
    """Supported values of a key of config.json; the first is the meaning of an absent key."""

    key: str
    values: tuple[Any, ...]

    def check(self, config: HuggingFaceConfig) -> None:
        """Raise WeightsError unless the key has one of the values."""
        value = config.get(self.key, self.values[0])
        if not any(value == allowed and type(value) is type(allowed) for allowed in self.values):
            supported = " or ".join(repr(value) for value in self.values)
            raise WeightsError(f"config.json has {self.key} {value!r}, and {supported} is supported.")


@dataclass(frozen=True)
class NeededOfLayers:
    """A key that lists one value per layer, all of which must be the same."""

    key: str
    value: str

    def check(self, config: HuggingFaceConfig) -> None:
        """Raise WeightsError unless every layer has the value; an absent key means that it does."""
        values = config.get(self.key) or []
        if not isinstance(values, list):
            raise WeightsError(f"config.json has {self.key} {values!r}, and a list or null is supported.")
        other = sorted({str(value) for value in values} - {self.value})
        if other:
            raise WeightsError(f"config.json has {self.key} with {', '.join(other)}, and {self.value!r} is supported.")


# transformers honors them in every family.
_NEEDED_BY_ALL: tuple[Needed | NeededOfLayers, ...] = (
    NeededOfLayers("layer_types", "full_attention"),
    Needed("is_causal", (True,)),
    Needed("per_layer_config", (None,)),
)


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    `to_fields` converts a config.json to fields of ModelConfig, and `to_config` does the reverse. `managed` are the
    keys that those fields determine, so they are never carried over from another config.json.
    """

    model_type: str
    architecture: str
    modules: Mapping[str, Module]
    to_fields: Callable[[HuggingFaceConfig], dict[str, Any]]
    to_config: Callable[[ModelConfig], dict[str, Any]]
    needed: tuple[Needed, ...] = ()
    managed: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ("",)
    """Prefixes that a tensor's name may have; the first one is written."""
    buffers: tuple[str, ...] = ()
    """Suffixes of the names of computed tensors, which older files hold and nobody needs."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that have the same value for all models of the family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' defaults for keys of config.json that `to_fields` does not handle."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Aliases that transformers accepts for keys of config.json: {alias: the family's own name}."""

    def model_fields(self, config: HuggingFaceConfig) -> dict[str, Any]:
        """Convert a config.json to fields of ModelConfig; WeightsError if it is not supported."""
        if config.get("quantization_config"):
            raise WeightsError("config.json has a quantization_config, and unquantized weights are supported.")
        config = {**self.defaults, **self._in_own_names(config)}
        for needed in (*self.needed, *_NEEDED_BY_ALL):
            needed.check(config)
        fields = self.to_fields(config)
        is_grouped = fields["num_attention_heads"] % fields["num_key_value_heads"] == 0
        if not is_grouped:
            raise WeightsError(
                f"config.json has num_key_value_heads {fields['num_key_value_heads']}, which must divide "
                f"num_attention_heads {fields['num_attention_heads']}; use the model's own config.json."
            )
        return fields

    def _in_own_names(self, config: HuggingFaceConfig) -> HuggingFaceConfig:
        """Return the config without aliases; WeightsError if an alias contradicts the name it stands for."""
        own = {key: value for key, value in config.items() if key not in self.aliases}
        for alias, key in self.aliases.items():
            if alias in config and own.setdefault(key, config[alias]) != config[alias]:
                raise WeightsError(
                    f"config.json has {key} {own[key]!r} and {alias} {config[alias]!r}, two names of one setting; "
                    "remove one of them."
                )
        return own

    def names(self, ours: str) -> tuple[tuple[str, ...], Arrange]:
        """Return their tensors that make up our parameter, and how; WeightsError if the family does not have it."""
        module, _, leaf = ours.rpartition(".")
        number = ""
        if module.startswith("layers."):
            _, number, rest = module.split(".", 2)
            module = f"layers.*.{rest}"
        if module not in self.modules:
            raise WeightsError(f"{self.model_type} has nothing for our parameter {ours}.")
        theirs = self.modules[module]
        return tuple(f"{name.replace('*', number)}.{leaf}" for name in theirs.names), theirs.arrange

    def is_buffer(self, name: str) -> bool:
        """Return whether a tensor is a computed buffer and not a weight."""
        return name.endswith(self.buffers) if self.buffers else False
