"""The weights in a Hugging Face folder, under the names of the transformers model, read one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.loading_report import LoadStateDictInfo

from megatron.hf.conversions import Conversion, EmptyTensors, Forms, plan_loading, plan_saving
from megatron.hf.empty_model import build_empty, config_of
from megatron.weights.errors import WeightsError, first_line
from megatron.weights.parameters import owned_tensors, tied_names
from megatron.weights.published_config import QUANTIZATION, read_published_config
from megatron.weights.safetensors_folder import SafetensorsFolder
from megatron.weights.source import WEIGHTS, StateSource

# Formats that transformers dequantizes on any device, exactly but for the rounding to the model's dtype.
DEQUANTIZED = ("mxfp4", "fp8")


def folder_source(folder: Path) -> StateSource:
    """Open a Hugging Face folder under the names of the model that AutoModelForCausalLM builds; reads no tensor.

    transformers' own conversions are applied as each parameter is read: names, stacks of experts, MXFP4 and FP8 blocks.

    Raises:
        WeightsError: the model is unknown or quantized otherwise, or a tensor is missing, unknown or of another shape.
    """
    published = read_published_config(folder)
    model = build_empty(config_of(published))
    return FolderSource(folder, SafetensorsFolder(folder), model, published.get(QUANTIZATION))


class FolderSource:
    """A StateSource without moments over the tensors of a Hugging Face folder."""

    step: int | None = None

    def __init__(
        self, folder: Path, tensors: SafetensorsFolder, model: PreTrainedModel, quantization: Mapping[str, Any] | None
    ) -> None:
        """Plan how each parameter of the empty `model` is read."""
        self._tensors = tensors
        self._conversions = conversions_of(folder, tensors, model, quantization)
        self._check_tied(folder, tied_names(model))
        self._owned = owned_tensors(model)
        self.loss_scale: Mapping[str, float] = {}

    @property
    def names(self) -> Sequence[str]:
        return list(self._owned)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._owned[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._conversions[name].targets[name].dtype

    def get(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.read(name, WEIGHTS, 0, Size(shape).numel()).view(shape)

    def parts(self, name: str) -> Sequence[str]:
        return (WEIGHTS,)

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        assert part == WEIGHTS, "a source without a step has no moments"
        return self._conversions[name].read(name, start, count, self._tensors.read)

    def _check_tied(self, folder: Path, tied: Mapping[str, str]) -> None:
        """Find each tied weight under one of its names; WeightsError where two of them hold different tensors.

        transformers unties such weights; here the model is built before its weights are read.
        """
        for alias, owner in tied.items():
            if owner not in self._conversions and alias in self._conversions:
                self._conversions[owner] = _renamed(self._conversions.pop(alias), alias, owner)
            second = self._conversions.pop(alias, None)
            if second is not None:
                names = self._conversions[owner].source_names[0], second.source_names[0]
                if not self._tensors.same(*names):
                    raise WeightsError(
                        f"{folder} ties {names[0]!r} and {names[1]!r} by tie_word_embeddings, and they differ; set "
                        f"tie_word_embeddings to false in config.json, or remove {names[1]!r}."
                    )


def conversions_of(
    folder: Path, tensors: Forms, model: PreTrainedModel, quantization: Mapping[str, Any] | None = None
) -> dict[str, Conversion]:
    """Return the conversion that gives each tensor of the empty `model`, tied ones under the names that the folder has.

    WeightsError, which names them, for tensors that are missing, unknown, quantized or of another shape.
    """
    expected = model.state_dict()
    faults = _faults_of_published_names(tensors, model)
    try:
        conversions, surplus = plan_loading(model, tensors, _transforms(folder, model, quantization))
    except WeightsError as error:
        raise _not_whole(folder, faults or [str(error)]) from error
    by_target = {name: conversion for conversion in conversions for name in conversion.targets}
    alternatives: dict[str, set[str]] = {}
    for alias, owner in tied_names(model).items():
        alternatives.setdefault(owner, {owner}).add(alias)
    lacking = [name for name in owned_tensors(model) if not alternatives.get(name, {name}) & set(by_target)]
    misshapen = [
        f"{name!r} is {list(conversion.targets[name].shape)}, and config.json asks for {list(expected[name].shape)}"
        for name, conversion in by_target.items()
        if name in expected and conversion.targets[name].shape != expected[name].shape
    ]
    if lacking or misshapen:
        raise _not_whole(folder, faults or [*(f"{name!r} is missing" for name in lacking), *misshapen])
    unknown = _unknown(model, [*surplus, *(name for name in by_target if name not in expected)])
    if unknown:
        raise _not_whole(folder, [f"{name!r} is no part of the model" for name in unknown])
    floating = {name: each for name, each in by_target.items() if expected[name].is_floating_point()}
    _refuse_quantized(folder, tensors, floating, is_described=quantization is not None)
    return by_target


def _transforms(
    folder: Path, model: PreTrainedModel, quantization: Mapping[str, Any] | None
) -> Sequence[WeightTransform]:
    """Return transformers' conversions for the model, with dequantization first; WeightsError for other formats."""
    if quantization is None:
        return get_model_conversion_mapping(model)
    method = quantization.get("quant_method")
    if method not in DEQUANTIZED:
        raise WeightsError(
            f"the weights in {folder} are quantized ({method}), and of quantized weights only "
            f"{' and '.join(DEQUANTIZED)} can be read; save the model in bf16 first (transformers' dequantize and "
            "save_pretrained)."
        )
    try:
        settings = AutoQuantizationConfig.from_dict(dict(quantization))
        settings.dequantize = True
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        return get_model_conversion_mapping(model, hf_quantizer=quantizer)
    except Exception as error:  # of transformers, for settings that it does not know
        raise WeightsError(
            f"the weights in {folder} are quantized in a way that cannot be read ({first_line(error)}); save the model "
            "in bf16 first."
        ) from error


def _faults_of_published_names(tensors: Forms, model: PreTrainedModel) -> list[str]:
    """Describe what the folder lacks of the names that the model is published under, if it has most of them.

    This names one expert's tensor, where the stack that it belongs to is what cannot be read.
    """
    published: dict[str, Tensor] = {}
    for conversion in plan_saving(model, EmptyTensors(owned_tensors(model))):
        published |= conversion.targets
    names = set(tensors.names)
    if 2 * len(names & set(published)) < len(published):
        return []
    faults = [f"{name!r} is missing" for name in published if not {name, f"{name}_blocks"} & names]
    return faults + [
        f"{name!r} is {list(tensors.shape(name))}, and config.json asks for {list(tensor.shape)}"
        for name, tensor in published.items()
        if name in names and tensors.shape(name) != tuple(tensor.shape)
    ]


def _unknown(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return those of the names that transformers does not leave out on purpose, such as a head for several tokens."""
    info = LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(names),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.unexpected_keys)


def _refuse_quantized(folder: Path, tensors: Forms, by_target: Mapping[str, Conversion], *, is_described: bool) -> None:
    """Raise WeightsError for quantized values that nothing dequantizes, and for those whose scales are not there."""
    for name, conversion in by_target.items():
        dtype = conversion.targets[name].dtype
        if not is_described and (not dtype.is_floating_point or dtype.itemsize < 2):
            raise WeightsError(
                f"{conversion.source_names[0]!r} in {folder} holds {str(dtype).removeprefix('torch.')}, and "
                f"config.json does not describe the quantization in {QUANTIZATION}; save the model in bf16 first."
            )
        patterns = conversion.sources.items()
        scales = [each for pattern, names in patterns if "scale" in pattern for each in names]
        narrow = [each for pattern, names in patterns if "scale" not in pattern for each in names]
        narrow = [each for each in narrow if tensors.dtype(each).itemsize < 2]
        if len(narrow) != len(scales):
            raise _not_whole(folder, [f"{narrow[0] if narrow else name!r} is quantized, and has no scales"])


def _renamed(conversion: Conversion, name: str, new_name: str) -> Conversion:
    """Return a conversion that gives one of its results another name."""
    renamed = copy(conversion)
    renamed.targets = {new_name if each == name else each: tensor for each, tensor in conversion.targets.items()}
    return renamed


def _not_whole(folder: Path, faults: Sequence[str]) -> WeightsError:
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return WeightsError(
        f"the weights in {folder} are not those of its config.json: {'; '.join(faults[:3])}{more}; copy the folder "
        "again, or use the config.json of these weights."
    )
