"""The config.json of portable weights, which are safetensors under our parameter names.

    {"model": {fields of ModelConfig}, "vocab_size": ids, "padded_vocab_size": rows,
     "hugging_face": the config.json of the Hugging Face model that they came from, or null}

The config.json of a training run also has "model". It serves too, where the rest is not needed or is given otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron.config import ConfigError, ModelConfig, architecture_fields, check_architecture
from megatron.core.json_text import parse_object
from megatron.weights.errors import WeightsError

CONFIG_FILE = "config.json"
_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class PortableConfig:
    """The content of the config.json of portable weights."""

    model: ModelConfig
    vocab_size: int
    """Number of tokenizer ids, each with an embedding row."""

    padded_vocab_size: int
    """Rows of the embedding."""

    hugging_face: Mapping[str, Any] | None = field(default=None, hash=False)
    """The config.json of the Hugging Face model that the weights came from."""

    def write(self, folder: Path) -> None:
        """Write config.json."""
        content = {
            "model": {**architecture_fields(self.model), "max_position_embeddings": self.model.max_position_embeddings},
            "vocab_size": self.vocab_size,
            "padded_vocab_size": self.padded_vocab_size,
            "hugging_face": self.hugging_face,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path, num_rows: int) -> PortableConfig:
        """Read the config.json of weights whose embedding has `num_rows`; without vocab_size, every row is an id.

        WeightsError if it does not describe one of our models.
        """
        path = folder / CONFIG_FILE
        content = read_json(path)
        if not isinstance(content.get("model"), dict):
            raise WeightsError(
                f"{path} has no section 'model', so it is not that of a model of this program; convert a Hugging Face "
                "folder with tools/hf2megads_weight_converter.py to-megatron."
            )
        try:
            model = model_of(content["model"])
        except (KeyError, TypeError) as error:
            raise WeightsError(f"{path} is incomplete ({error}); convert the weights again.") from error
        vocab_size, origin = content.get("vocab_size") or num_rows, content.get("hugging_face")
        if type(vocab_size) is not int or vocab_size < 1:
            raise WeightsError(f"{path} has vocab_size {vocab_size!r}, which must be a whole number above 0.")
        if not isinstance(origin, dict | None):
            raise WeightsError(f"{path} has hugging_face {origin!r}, which must be an object or null.")
        return cls(model, vocab_size, num_rows, origin)


def model_of(architecture: Mapping[str, Any]) -> ModelConfig:
    """Build the ModelConfig from the fields of an architecture; seq_length becomes the number of positions.

    WeightsError for a field that ModelConfig does not have: without it, the model would be a different one.
    """
    unknown = set(architecture) - {member.name for member in fields(ModelConfig)}
    if unknown:
        raise WeightsError(f"the architecture has {', '.join(sorted(unknown))}, unknown here; use a newer version.")
    kinds = get_type_hints(ModelConfig)
    for name, value in architecture.items():
        if not _is_of(kinds[name], value):
            raise WeightsError(f"{name} is {value!r}, which must be {_KINDS.get(kinds[name], 'another value')}.")
    model = ModelConfig(**{"seq_length": architecture["max_position_embeddings"], **architecture}).resolved()
    try:
        check_architecture(model)
    except ConfigError as error:
        raise WeightsError(f"the architecture cannot be trained: {error}.") from error
    return model


def refuse_hugging_face_model(folder: Path) -> None:
    """Raise WeightsError if the config.json of a training run is of --hf-model."""
    model = read_json(folder / CONFIG_FILE).get("model") if (folder / CONFIG_FILE).is_file() else None
    if isinstance(model, dict) and model.get("hf_config") is not None:
        raise WeightsError(
            f"{folder} is of a Hugging Face model ({model['hf_config'].get('model_type')}, --hf-model), and only "
            "models that flags describe are read here; write its folder with tools/hf2megads_weight_converter.py "
            f"to-hf {folder} OUT. transformers loads OUT, and so do the tools if the model is of a family that "
            "to-megatron converts."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; WeightsError if there is none."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); name a folder that has it.") from error


def _is_of(kind: Any, value: object) -> bool:
    """Return whether a JSON value has a field's type; an int is accepted for a float."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(member, value) for member in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    if kind is int:
        return type(value) is int and 0 <= value < 2**53
    return type(value) is kind
