"""A transformers model without storage, built from a config.json: its names, shapes and conversions."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron.weights.errors import WeightsError, first_line
from megatron.weights.published_config import QUANTIZATION


def config_of(published: Mapping[str, Any]) -> PretrainedConfig:
    """Build transformers' configuration, of the model without quantization; WeightsError for an unknown model."""
    model_type = str(published.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise WeightsError(f"config.json has model_type {model_type!r}, which this transformers does not have.")
    plain = {name: value for name, value in published.items() if name != QUANTIZATION}
    try:
        return CONFIG_MAPPING[model_type].from_dict(deepcopy(plain))
    except Exception as error:  # a wrong value can raise many kinds of errors inside transformers
        raise WeightsError(f"config.json describes no {model_type} ({first_line(error)}); copy it again.") from error


def build_empty(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model of a configuration on the meta device: nothing is allocated.

    WeightsError if the configuration has none.
    """
    try:
        with torch.device("meta"):
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    except Exception as error:
        raise WeightsError(
            f"transformers cannot build the {config.model_type} that config.json describes ({first_line(error)}); use "
            "the config.json of a causal language model."
        ) from error
