"""Folders that `from_pretrained` loads: weights under their published names, written tensor by tensor."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from megatron.hf.conversions import Conversion, EmptyTensors, Forms, Read, plan_saving
from megatron.hf.empty_model import build_empty, config_of
from megatron.hf.weights import conversions_of
from megatron.weights.errors import WeightsError
from megatron.weights.hugging_face import ReportingWriter, Settings, copy_tokenizer
from megatron.weights.parameters import owned_tensors, tied_names
from megatron.weights.portable_config import CONFIG_FILE
from megatron.weights.published_config import QUANTIZATION
from megatron.weights.source import WEIGHTS, StateSource

_POSITIONS = "max_position_embeddings"
_NOT_CARRIED_OVER = (QUANTIZATION, "_name_or_path")


@dataclass(frozen=True)
class Target:
    """The folder to write."""

    folder: Path
    settings: Settings = field(default_factory=Settings)

    beside: tuple[Path, ...] = ()
    """Folders whose tokenizer and generation_config.json are copied; of files of one name, the first is taken."""

    max_position_embeddings: int | None = None
    """Context length to write into config.json; None: the model's own."""


class Export:
    """The plan of a folder: what each of its tensors is made of."""

    def __init__(self, published: Mapping[str, Any], weights: Forms, dtype: torch.dtype | None = None) -> None:
        """Plan the folder of `weights`, which have the names of the model that `published`, a config.json, describes.

        With `dtype`, the weights are cast, except those that transformers keeps in fp32.

        WeightsError if the weights are of another model.
        """
        self._published = published
        self._model = build_empty(config_of(published))
        _check_names(self._model, weights)
        self._dtypes = {name: weights.dtype(name) for name in weights.names}
        if dtype is not None:
            kept = _kept_in_fp32(self._model, dtype)
            cast = [name for name, stored in self._dtypes.items() if stored.is_floating_point]
            self._dtypes |= {name: dtype for name in cast if kept is None or not kept.search(name)}
        empty = {
            name: torch.empty(tensor.shape, dtype=self._dtypes[name], device="meta")
            for name, tensor in owned_tensors(self._model).items()
        }
        self.conversions = plan_saving(self._model, EmptyTensors(empty))
        written = {name: tensor for conversion in self.conversions for name, tensor in conversion.targets.items()}
        conversions_of(Path("the export"), EmptyTensors(written), self._model)  # what is written can be read

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return type(self._model).__name__

    def add(self, conversion: Conversion, read: Read, writer: ReportingWriter) -> None:
        """Convert one conversion's tensors and write them. At most its sources and results are in memory."""

        def read_cast(name: str, start: int, count: int) -> Tensor:
            return read(name, start, count).to(self._dtypes[name])

        for name, tensor in conversion.results(read_cast):
            writer.add(name, tensor)

    def open(self, target: Target) -> ReportingWriter:
        """Begin the folder with all that it holds besides weights. It appears when the writer is left without an error.

        WeightsError if it exists and is not empty.
        """
        content = self._config_json(target.max_position_embeddings)
        writer = ReportingWriter(target.folder, replace(target.settings, dtype=None), with_manifest=False)
        (writer.staging / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        for folder in target.beside:
            copy_tokenizer(folder, writer.staging)
        return writer

    def _config_json(self, max_position_embeddings: int | None) -> dict[str, Any]:
        content = {name: value for name, value in self._published.items() if name not in _NOT_CARRIED_OVER}
        content["architectures"] = [self.architecture]
        # The older name of the key, where the model was published with it, so that older programs read it, too.
        key = "torch_dtype" if "torch_dtype" in self._published else "dtype"
        content[key] = str(self._most_common_dtype()).removeprefix("torch.")
        if max_position_embeddings is not None:
            content[self._model.config.attribute_map.get(_POSITIONS, _POSITIONS)] = max_position_embeddings
            _check_names(build_empty(config_of(content)), EmptyTensors(owned_tensors(self._model)))
        return content

    def _most_common_dtype(self) -> torch.dtype:
        counts: Counter[torch.dtype] = Counter()
        for name, tensor in owned_tensors(self._model).items():
            counts[self._dtypes[name]] += tensor.numel()
        return counts.most_common(1)[0][0]


def save_folder(source: StateSource, published: Mapping[str, Any], target: Target) -> str:
    """Write weights that have the names of a transformers model as its folder; return the name of its class.

    WeightsError if the weights are of another model than `published`, a config.json, describes, or the folder exists.
    """
    export = Export(published, source, target.settings.dtype)
    with export.open(target) as writer:
        for conversion in export.conversions:
            export.add(conversion, lambda name, start, count: source.read(name, WEIGHTS, start, count), writer)
    return export.architecture


def _check_names(model: PreTrainedModel, weights: Forms) -> None:
    """Raise WeightsError unless the weights are those of the model; other names of tied ones are allowed."""
    owned, names = owned_tensors(model), set(weights.names)
    faults = [f"{name!r} is missing" for name in owned if name not in names]
    faults += [f"{name!r} is no part of the model" for name in sorted(names - set(owned) - set(tied_names(model)))]
    faults += [
        f"{name!r} is {list(weights.shape(name))}, and config.json asks for {list(tensor.shape)}"
        for name, tensor in owned.items()
        if name in names and weights.shape(name) != tuple(tensor.shape)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightsError(
            f"these weights are not those of a {type(model).__name__} as config.json describes it: "
            f"{'; '.join(faults[:3])}{more}; use the config.json of the model that was trained."
        )


def _kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return the pattern of the names that transformers loads in fp32, whatever the `dtype` asked for."""
    plan = model._get_dtype_plan(dtype)
    return build_glob_alternation(list(plan))[0] if plan else None
