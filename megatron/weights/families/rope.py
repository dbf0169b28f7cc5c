"""Rotary positions in config.json: transformers 5 writes `rope_parameters`, before it was `rope_theta`, `rope_scaling`.

The older spelling is written: every transformers, and the programs around it, read it. The parameters of a scaling are
called the same here, after `rope_scaling_`.
"""

from __future__ import annotations

from typing import Any

from megatron.config import ModelConfig
from megatron.config.model import ROPE_SCALING_PARAMETERS
from megatron.weights.errors import WeightsError
from megatron.weights.families.family import HuggingFaceConfig

KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
_PREFIX = "rope_scaling_"
_ORIGINAL = "original_max_position_embeddings"
_TYPES = {"default": "none"} | {name: name for name in ROPE_SCALING_PARAMETERS if name != "none"}
# Keys that stand beside a scaling's own, and those that say what is always so here.
_BESIDE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_ALWAYS = {"truncate": True}


def rope_fields(config: HuggingFaceConfig, theta: float = 10000.0, percent: float = 1.0) -> dict[str, Any]:
    """Fields of ModelConfig, in whichever spelling; theta and percent are the family's where the file is silent.

    WeightsError for a scaling that is not known here, or one that lacks a number or has one too many.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _TYPES:
        supported = ", ".join(map(repr, _TYPES))
        raise WeightsError(f"config.json has rope_type {kind!r}, and {supported} are supported.")
    base: Any = rope.get("rope_theta", config.get("rope_theta", theta))
    share: Any = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", percent))
    return {
        "use_rotary_position_embeddings": True,
        "rotary_position_embeddings_theta": float(base),
        "rotary_percent": float(share),
        "rope_scaling_type": _TYPES[kind],
        **_scaling_fields(_TYPES[kind], rope, config.get("max_position_embeddings")),
    }


def _scaling_fields(kind: Any, rope: HuggingFaceConfig, max_position_embeddings: int | None) -> dict[str, Any]:
    """The numbers of a scaling. The original context is the model's where the scaling does not name it."""
    known = {name.removeprefix(_PREFIX): name for name in ROPE_SCALING_PARAMETERS[kind]}
    other = {key: value for key, value in rope.items() if key not in known and key not in _BESIDE}
    for key, value in other.items():
        if value is not None and _ALWAYS.get(key) != value:
            raise WeightsError(f"config.json has {key} {value!r} with rope_type {kind!r}, which is not supported.")
    given = {key: value for key, value in rope.items() if key in known and value is not None}
    if kind == "dynamic":  # whose own number transformers passes over
        given.pop(_ORIGINAL, None)
    if _ORIGINAL in known:
        given.setdefault(_ORIGINAL, max_position_embeddings)
    if "factor" in known and "factor" not in given:
        raise WeightsError(f"config.json has rope_type {kind!r} without a factor; use the model's own config.json.")
    return {known[key]: value if key == _ORIGINAL else float(value) for key, value in given.items()}


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """Keys of config.json. With dynamic, transformers takes max_position_embeddings for the original context."""
    kind, theta = model.rope_scaling_type, model.rotary_position_embeddings_theta
    if kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    numbers = {name.removeprefix(_PREFIX): getattr(model, name) for name in ROPE_SCALING_PARAMETERS[kind]}
    scaling = {"rope_type": kind, **{key: value for key, value in numbers.items() if value is not None}}
    if kind != "dynamic":
        return {"rope_theta": theta, "rope_scaling": scaling}
    return {"rope_theta": theta, "max_position_embeddings": scaling.pop(_ORIGINAL), "rope_scaling": scaling}
