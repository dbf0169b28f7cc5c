"""Families of Hugging Face models, one file for each kind."""

from __future__ import annotations

from megatron.weights.errors import WeightsError
from megatron.weights.families.family import Family
from megatron.weights.families.gpt2 import GPT2
from megatron.weights.families.gpt_neox import GPT_NEOX
from megatron.weights.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

# The order in which they are tried for a model that names none.
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX)}


def family_of(model_type: object) -> Family:
    """Return the family of a model_type; WeightsError if it is not supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise WeightsError(
            f"config.json has model_type {model_type!r}, and {supported} are supported; train another with --hf-model, "
            "and generate with transformers."
        )
    return FAMILIES[model_type]
