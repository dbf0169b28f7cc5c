"""RoPE in config.json: transformers 5 writes `rope_parameters`; older versions write `rope_theta`, `rope_scaling`.

This module writes the older form: every version of transformers reads it, and so do the programs around it. Our names
of a scaling's parameters are theirs with the prefix `rope_scaling_`.
"""

from __future__ import annotations

from typing import Any

from megatron.config import ModelConfig
from megatron.config.model import ROPE_SCALING_PARAMETERS
from megatron.weights.errors import WeightsError
from megatron.weights.families.values import HuggingFaceConfig, count, number

_ORIGINAL = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"
_THETA = "rotary_position_embeddings_theta"
KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", _SHARE, _ORIGINAL})
_PREFIX = "rope_scaling_"
_TYPES = {"default": "none"} | {name: name for name in ROPE_SCALING_PARAMETERS if name != "none"}
# Keys next to a scaling's own parameters, and keys whose meaning is fixed here.
_OTHER_KEYS = {"rope_type", "type", "rope_theta", _SHARE, "finetuned"}
_ALWAYS = {"truncate": True}
_NEEDED = {"factor", "low_freq_factor", "high_freq_factor"}
_DEFAULT_IF_ZERO = {"beta_fast", "beta_slow"}
_MSCALES = {"mscale", "mscale_all_dim"}
_BORDERS = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("high_freq_factor", "low_freq_factor")}


def rope_fields(config: HuggingFaceConfig, theta_key: str = "rope_theta") -> dict[str, Any]:
    """Convert either form to fields of ModelConfig, for a family that rotates whole heads.

    If such a family names a share of the head, transformers ignores it, or fails if there is a scaling as well.
    WeightsError for an unknown scaling, or for one with a missing or an extra number.
    """
    rope = _parameters(config)
    kind = _kind(rope)
    share = rope.get(_SHARE, config.get(_SHARE))
    if kind != "none" and share not in (None, 1):
        raise WeightsError(
            f"config.json has {_SHARE} {share!r} with rope_type {kind!r}, and its model_type rotates whole heads; "
            f"remove {_SHARE}."
        )
    is_unused = "rope_theta" in rope and config.get(theta_key) is None
    outer_theta = 1e4 if is_unused else number(config, theta_key, 1e4, _THETA)
    return {
        "use_rotary_position_embeddings": True,
        _THETA: number(rope, "rope_theta", outer_theta, _THETA),
        "rotary_percent": 1.0,
        "rope_scaling_type": kind,
        **_scaling_fields(kind, rope, config),
    }


def partial_rope_fields(config: HuggingFaceConfig, theta_key: str, share_key: str, share: float) -> dict[str, Any]:
    """Convert either form for a family that rotates a share of each head, under own names outside `rope_parameters`."""
    rope = _parameters(config)
    in_rope = _SHARE in rope
    percent = number(rope if in_rope else config, _SHARE if in_rope else share_key, share, "rotary_percent")
    whole = {key: value for key, value in config.items() if key != _SHARE}
    whole |= {"rope_scaling": None, "rope_parameters": {key: value for key, value in rope.items() if key != _SHARE}}
    return {**rope_fields(whole, theta_key), "rotary_percent": percent}


def _parameters(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the object that describes RoPE; as in transformers, the older key wins if both are set."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise WeightsError(f"config.json has {key} {rope!r}, which must be an object or null.")
        if rope:
            return rope
    return {}


def _kind(rope: HuggingFaceConfig) -> Any:
    """Return our name for the scaling."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _TYPES:
        supported = ", ".join(map(repr, _TYPES))
        raise WeightsError(f"config.json has rope_type {kind!r}, and {supported} are supported.")
    return _TYPES[kind]


def _scaling_fields(kind: Any, rope: HuggingFaceConfig, config: HuggingFaceConfig) -> dict[str, Any]:
    """Return the numbers of a scaling.

    The original context is that of the scaling, unless the config names one next to it. With dynamic, transformers
    uses max_position_embeddings, whatever else is named.
    """
    known = {name.removeprefix(_PREFIX): name for name in ROPE_SCALING_PARAMETERS[kind]}
    _refuse_unknown(kind, rope, set(known) | _OTHER_KEYS | {_ORIGINAL})
    given = {key: rope[key] for key in known if rope.get(key) is not None and key != _ORIGINAL}
    given = {key: value for key, value in given.items() if value != 0 or key not in _DEFAULT_IF_ZERO}
    if "attention_factor" in given or not all(given.get(key) for key in _MSCALES):  # which transformers ignores
        given = {key: value for key, value in given.items() if key not in _MSCALES}
    for key in _NEEDED & set(known) - set(given):
        raise WeightsError(f"config.json has rope_type {kind!r} without a {key}; use the model's own config.json.")
    fields: dict[str, Any] = {known[key]: number(given, key, 1.0, known[key]) for key in given}
    _check_borders(kind, given)
    if _ORIGINAL in known:
        positions = count(config, "max_position_embeddings")
        sources = () if kind == "dynamic" else (rope, config)
        for source in sources:
            positions = count(source, _ORIGINAL, positions)
        fields[known[_ORIGINAL]] = positions
    return fields


def _refuse_unknown(kind: str, rope: HuggingFaceConfig, known: set[str]) -> None:
    for key, value in rope.items():
        if key not in known and value is not None and _ALWAYS.get(key) is not value:
            raise WeightsError(f"config.json has {key} {value!r} with rope_type {kind!r}, which is not supported.")


def _check_borders(kind: str, given: HuggingFaceConfig) -> None:
    """Raise WeightsError unless the bound of fast dimensions is the larger one; llama3 divides by their difference."""
    if kind not in _BORDERS:
        return
    fast, slow = _BORDERS[kind]
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0}
    high, low = ({**defaults, **given}[key] for key in (fast, slow))
    if high < low or (kind == "llama3" and high == low):
        raise WeightsError(f"config.json has {fast} {high} and {slow} {low}, and {fast} must be the larger one.")


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json. With dynamic, max_position_embeddings is the original context in transformers."""
    kind, theta = model.rope_scaling_type, model.rotary_position_embeddings_theta
    if kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    numbers = {name.removeprefix(_PREFIX): getattr(model, name) for name in ROPE_SCALING_PARAMETERS[kind]}
    scaling = {"rope_type": kind, **{key: value for key, value in numbers.items() if value is not None}}
    if kind != "dynamic":
        return {"rope_theta": theta, "rope_scaling": scaling}
    return {"rope_theta": theta, "max_position_embeddings": scaling.pop(_ORIGINAL), "rope_scaling": scaling}
