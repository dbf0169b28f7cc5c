"""A small configuration of the same model: every setting as it is, two layers of each kind, small widths.

Fields are found by the names that transformers' configurations share. Counts and sizes shrink in proportion: query and
key/value heads keep their ratio (8 at most), all dimensions of a head are divided by one number, so that partial rotary
embeddings stay whole, and windows and local blocks become shorter than a test sequence of a few dozen tokens.
What a name does not reveal is found on the model: layers are of one kind if their modules, shapes and flags are equal.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron.config.errors import ConfigError
from megatron.hf.inspection import decoder_layers

LAYERS_OF_EACH_KIND = 2
MOST_PARAMETERS = 2_000_000
VOCABULARY = 64
HEAD_DIMENSION = 16
WINDOW = 7
LOCAL_BLOCK = 8
SHORT_LENGTH = 16
FEED_FORWARD = 24
LOW_RANK = 12
POSITIONS = 128
MOST_QUERIES_PER_KEY = 8

_HEAD_COUNT = re.compile(r"(^|_)(n|num)_([a-z_]+_)?heads?(_per_layer)?$|^(attention_heads|decoder_attention_heads)$")
_KEY_VALUE = re.compile(r"kv|key_value")
_HEAD_DIMENSION = re.compile(r"head_dim|head_size|rotary_dim|rotary_ndims|kv_channels|mrope_section|dim_head$")
_FEED_FORWARD = re.compile(r"intermediate_size|ffn|n_inner|d_ff|dff|feed_forward_size|dim_ff$")
_EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num)$")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_GROUPS = ("n_group", "num_expert_group")
_GROUPS_TAKEN = ("topk_group", "num_limited_groups")
_VOCABULARY = re.compile(r"vocab_size$")
_TOKEN = re.compile(r"_token_id$|_token_index$|_token_ids$")
_WINDOW = re.compile(r"(^|_)window(_size|_len)?$|^window_size$")
_LOCAL_BLOCK = re.compile(r"attention_chunk_size")
_LENGTH_OF_A_STEP = re.compile(r"floor_scale|n_floor$")
_RANDOM = re.compile(r"drop|jitter")
_INDEX = re.compile(r"idx|index|layer_id|layer_num")
_KEPT = re.compile(r"position|max_seq|model_max_length")


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Return a small configuration of the same class; ConfigError if the model that it describes is not small."""
    small = copy.deepcopy(config)
    small.dtype = torch.float32
    _shrink_widths(small)
    _shrink_depth(small)
    model = on_meta(small)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        name, parameter = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise ConfigError(
            f"the Hugging Face model ({config.model_type}) cannot be checked: a small copy of it still has {count:,} "
            f"parameters, {tuple(parameter.shape)} of them in {name}; at most {MOST_PARAMETERS:,} are allowed, so that "
            "the check takes seconds; train this model with transformers itself"
        )
    return small


def on_meta(config: PretrainedConfig) -> nn.Module:
    """Build the model without memory."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model


def kind_of(layer: nn.Module) -> tuple[object, ...]:
    """Return what distinguishes layers: modules, shapes and flags, without the index of the layer."""
    parts: list[object] = []
    for name, module in layer.named_modules():
        flags = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | str)}
        named = sorted((key, value) for key, value in flags.items() if not _INDEX.search(key))
        parts.append((name, type(module).__name__, repr(named)))
    parts += [(name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()]
    return tuple(parts)


def _shrink_widths(config: PretrainedConfig) -> None:
    text = config.get_text_config()
    heads, scale_heads, scale_keys = _head_scales(text)
    hidden, dimension = text.hidden_size, _head_dimension(text, heads)
    divide = _divisor_of_heads(text, dimension)
    small_heads = heads / scale_heads
    small_hidden = int(small_heads * dimension / divide) if hidden == heads * dimension else 2 * HEAD_DIMENSION
    experts = _number_of_experts(text)
    slots = iter(range(VOCABULARY - 1, 0, -1))
    inner: dict[int, int] = {}

    def value(name: str, old: int) -> int:
        """Return the small value of one number."""
        if _KEPT.search(name):
            return old
        if _EXPERTS.search(name):
            return min(old, experts)
        if _HEAD_COUNT.search(name):
            return max(1, round(old / (scale_keys if _KEY_VALUE.search(name) else scale_heads)))
        if _HEAD_DIMENSION.search(name):
            return max(1, round(old / divide))
        if _VOCABULARY.search(name):
            return min(old, VOCABULARY)
        if _TOKEN.search(name):
            return old if 0 <= old < VOCABULARY // 2 else next(slots)
        if _FEED_FORWARD.search(name):
            return inner.setdefault(old, min(old, FEED_FORWARD + 8 * len(inner)))
        if name.endswith("_rank"):
            return min(old, LOW_RANK)
        for pattern, most in ((_WINDOW, WINDOW), (_LOCAL_BLOCK, LOCAL_BLOCK), (_LENGTH_OF_A_STEP, SHORT_LENGTH)):
            if pattern.search(name):
                return min(old, most)
        return small_hidden if old == hidden and old > 2 * HEAD_DIMENSION else old

    _replace_numbers(config, value)
    for parameters in _rope_parameters(text):
        _shrink_rope(text, parameters, divide)
    known = getattr(text, "max_position_embeddings", None) or 0
    if known > POSITIONS and any(parameter.shape[0] >= known for parameter in on_meta(config).parameters()):
        text.max_position_embeddings = POSITIONS  # they are learned: a row of a table each


def _shrink_rope(text: PretrainedConfig, parameters: dict[str, Any], divide: Fraction) -> None:
    """Shorten lists that have an entry per rotary dimension, and lengths after which RoPE or queries change."""
    kind = parameters.get("rope_type")
    for name in ("short_factor", "long_factor"):
        if factors := parameters.get(name):
            parameters[name] = factors[: int(len(factors) / divide)]
    if sections := parameters.get("mrope_section"):
        parameters["mrope_section"] = [int(section / divide) for section in sections]
    if kind == "dynamic":
        text.max_position_embeddings = SHORT_LENGTH
    if kind == "longrope" or parameters.get("llama_4_scaling_beta"):
        parameters["original_max_position_embeddings"] = SHORT_LENGTH
        if hasattr(text, "original_max_position_embeddings"):
            text.original_max_position_embeddings = SHORT_LENGTH


def _head_scales(text: PretrainedConfig) -> tuple[int, Fraction, Fraction]:
    """Return the number of query heads, and by what query and key/value heads are divided."""
    heads = text.num_attention_heads
    heads = heads[0] if isinstance(heads, list | tuple) else heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    keys = keys[0] if isinstance(keys, list | tuple) else keys
    small_keys = min(keys, 4 if keys == heads else 2)
    small_heads = small_keys * min(heads // keys, MOST_QUERIES_PER_KEY)
    return heads, Fraction(heads, small_heads), Fraction(keys, small_keys)


def _head_dimension(text: PretrainedConfig, heads: int) -> int:
    for name in ("head_dim", "kv_channels", "attention_head_dim"):
        if isinstance(found := getattr(text, name, None), int):
            return found
    return int(text.hidden_size // heads)


def _divisor_of_heads(text: PretrainedConfig, dimension: int) -> Fraction:
    """Return by what the dimensions of a head are divided: all of them, and their rotary part, stay whole and even."""
    sizes = [dimension]
    for name, found in vars(text).items():
        if _HEAD_DIMENSION.search(name):
            sizes += [size for size in _numbers(found) if size > 4]
    for parameters in _rope_parameters(text):
        sizes += [int(dimension * parameters.get("partial_rotary_factor", 1.0))]
    sizes += [int(dimension * getattr(text, name, 1.0)) for name in ("partial_rotary_factor", "rotary_pct")]
    for small in range(HEAD_DIMENSION // 2, dimension + 1, 2):
        divide = Fraction(dimension, small)
        if all((size / divide).denominator == 1 and size / divide >= 4 and size / divide % 2 == 0 for size in sizes):
            return divide
    return Fraction(1)


def _rope_parameters(text: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the RoPE settings: one dictionary, or one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or {}
    nested = [inner for inner in found.values() if isinstance(inner, dict)]
    return nested or [found]


def _number_of_experts(text: PretrainedConfig) -> int:
    """Return how many experts let every token choose as many as it does now, within as many groups."""
    inner = [value for value in vars(text).values() if isinstance(value, PretrainedConfig)]

    def largest(names: Sequence[str], otherwise: int) -> int:
        found = [getattr(each, name, None) or 0 for each in (text, *inner) for name in names]
        return max(found) or otherwise

    top_k, groups, taken = largest(_TOP_K, 2), largest(_GROUPS, 1), largest(_GROUPS_TAKEN, 1)
    return groups * max(2, -(-top_k // taken) + 1)


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]


def _replace_numbers(config: PretrainedConfig, value: Callable[[str, int], int]) -> None:
    """Replace the numbers of a configuration and of those inside it, and switch off what is random."""
    for name, old in list(vars(config).items()):
        if isinstance(old, PretrainedConfig):
            _replace_numbers(old, value)
        elif name.startswith("_"):
            continue
        elif isinstance(old, float) and _RANDOM.search(name):
            setattr(config, name, 0.0)
        elif isinstance(old, int) and not isinstance(old, bool):
            setattr(config, name, value(name, old))
        elif isinstance(old, list | tuple) and old and _numbers(old) == list(old):
            setattr(config, name, type(old)(value(name, each) for each in old))


def _shrink_depth(config: PretrainedConfig) -> None:
    """Keep two layers of each kind: these alone where lists of the configuration name kinds, else the first layers."""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    kinds: list[object] = [kind_of(layer) for layer in decoder_layers(on_meta(config))]
    chosen = _first_of_each(kinds)
    original = copy.deepcopy(vars(text))
    _take_layers(text, chosen)
    if _kinds_or_none(config) == [kinds[index] for index in chosen]:
        return
    for count in range(max(chosen) + 1, depth + 1):
        vars(text).update(copy.deepcopy(original))
        _take_layers(text, range(count))
        if set(_kinds_or_none(config) or ()) == set(kinds):
            return
    vars(text).update(original)


def _first_of_each(kinds: Sequence[object]) -> list[int]:
    counts: dict[object, int] = {}
    chosen = []
    for index, kind in enumerate(kinds):
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= LAYERS_OF_EACH_KIND:
            chosen.append(index)
    return chosen


def _kinds_or_none(config: PretrainedConfig) -> list[object] | None:
    """Return the kinds of the layers, None if the configuration contradicts itself."""
    try:
        model = on_meta(config)
    except Exception:  # whatever a model's code stumbles over
        return None
    return [kind_of(layer) for layer in decoder_layers(model)]


def _take_layers(text: PretrainedConfig, chosen: Iterable[int]) -> None:
    """Keep some of the layers in every list that has an entry per layer."""
    indices, depth = list(chosen), text.num_hidden_layers
    for name, old in list(vars(text).items()):
        if isinstance(old, list | tuple) and len(old) == depth:
            setattr(text, name, type(old)(old[index] for index in indices))
    text.num_hidden_layers = len(indices)
