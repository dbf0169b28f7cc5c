"""The configuration of a run: one frozen value, built once by `megatron.arguments.parse_args`."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum, EnumType
from typing import Any

from megatron.config.adapters import AdaptersConfig
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.deepspeed import DeepSpeedConfig
from megatron.config.errors import ConfigError
from megatron.config.finetuning import FinetuningConfig
from megatron.config.hugging_face import HuggingFaceModelConfig
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.precision import PrecisionConfig
from megatron.config.tokenizer import TokenizerConfig
from megatron.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, one member per concern.

    `given` names the flags that the user set (as attribute names), `notes` are lines for the log, and
    `deepspeed_json` is the content of the file that --deepspeed-config names.
    """

    model: ModelConfig
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    given: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    deepspeed_json: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers that can be written as JSON."""
        plain: dict[str, Any] = {name: _section_to_dict(getattr(self, name)) for name in config_sections()}
        plain["given"] = sorted(self.given)
        plain["notes"] = list(self.notes)
        plain["deepspeed_json"] = dict(self.deepspeed_json)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Config:
        """Return the configuration that `to_dict` wrote.

        Fields that this version does not know are ignored; fields missing in the stored version get their defaults.

        Raises:
            ConfigError: a field without a default is missing.
        """
        sections = {
            name: _section_from_dict(name, _kind_of(section, plain.get(name, {})), plain.get(name, {}))
            for name, section in config_sections().items()
        }
        return cls(
            **sections,
            given=frozenset(plain.get("given", ())),
            notes=tuple(plain.get("notes", ())),
            deepspeed_json=dict(plain.get("deepspeed_json", {})),
        )


def config_sections() -> dict[str, type]:
    """Return the sections of `Config`, attribute name to dataclass, in the order of --help."""
    types = typing.get_type_hints(Config)
    return {member.name: types[member.name] for member in fields(Config) if is_dataclass(types[member.name])}


def _section_to_dict(section: Any) -> dict[str, Any]:
    return {member.name: _plain(getattr(section, member.name)) for member in fields(section)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return _section_to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _stored(value: Any, annotation: Any) -> Any:
    """Return a value that `_plain` made plain as its field has it."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, EnumType) and value is not None:
            return kind(value)
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and is_dataclass(kind) and value is not None:
            return _section_from_dict(kind.__name__, kind, value)
    return tuple(value) if isinstance(value, list) else value


def _kind_of(section: type, plain: Mapping[str, Any]) -> type:
    """Return the dataclass of a stored section: that of a model depends on what describes it."""
    return HuggingFaceModelConfig if section is ModelConfig and "hf_config" in plain else section


def _section_from_dict(name: str, section: type, plain: Mapping[str, Any]) -> Any:
    annotations = typing.get_type_hints(section)
    known = {member.name for member in fields(section)}
    try:
        return section(**{key: _stored(value, annotations[key]) for key, value in plain.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the stored configuration's section {name!r} does not fit ({error}); it was written by another version "
            "or is damaged: give the settings as flags again"
        ) from error
