"""A transformers model without weights, built from a config.json: its names, shapes and conversions."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from megatron.hf.materialization import empty_model
from megatron.weights.errors import WeightsError, first_line
from megatron.weights.published_config import QUANTIZATION


def parse_config(content: Mapping[str, Any]) -> PretrainedConfig:
    """Build transformers' configuration, of the model without quantization, from a config.json.

    Raises:
        KeyError: transformers does not have the model.
        Exception: whatever it raises for values that it does not accept.
    """
    plain = {name: value for name, value in content.items() if name != QUANTIZATION}
    return CONFIG_MAPPING[content["model_type"]].from_dict(deepcopy(plain))


def config_of(published: Mapping[str, Any]) -> PretrainedConfig:
    """Build transformers' configuration of published weights; WeightsError for an unknown model."""
    model_type = str(published.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise WeightsError(f"config.json has model_type {model_type!r}, which this transformers does not have.")
    try:
        return parse_config(published)
    except Exception as error:  # a wrong value can raise many kinds of errors inside transformers
        raise WeightsError(f"config.json describes no {model_type} ({first_line(error)}); copy it again.") from error


def build_empty(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model of published weights, without them; WeightsError if there is none."""
    try:
        return empty_model(config)
    except Exception as error:
        raise WeightsError(
            f"transformers cannot build the {config.model_type} that config.json describes ({first_line(error)}); use "
            "the config.json of a causal language model."
        ) from error
