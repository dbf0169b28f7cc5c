"""Models that cannot be streamed, refused by what their configuration says, before anything is built.

What a configuration does not say is found by a run of a small copy (megatron.hf.structure).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from megatron.config.errors import ConfigError

OTHER_MODEL = "train this one with transformers itself, or choose a model whose layers are causal attention and an MLP"
_OTHER_MODELS = ("vision_config", "audio_config", "encoder_config", "vq_config")
_KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "block_types")
_WITH_STATE = ("linear", "mamba", "recurrent", "conv", "hybrid", "rwkv", "lightning")


class Refused(NamedTuple):
    """Why a model cannot be streamed, and what to do."""

    reason: str
    remedy: str = OTHER_MODEL


Rule = Callable[[PretrainedConfig], Refused | None]


def refuse(config: PretrainedConfig) -> None:
    """Raise a ConfigError if the configuration names something that cannot be streamed."""
    for rule in RULES:
        if refused := rule(config):
            raise refusal(config, *refused)


def refusal(config: PretrainedConfig, reason: str, remedy: str = OTHER_MODEL) -> ConfigError:
    """Return the error for a model that cannot be streamed."""
    return ConfigError(f"the Hugging Face model ({config.model_type}) cannot be streamed: {reason}; {remedy}")


def _setting(config: Any, *names: str) -> tuple[str, Any]:
    """Return the first of these settings that a configuration has and that is not off, with its name."""
    return next(((name, value) for name in names if (value := getattr(config, name, None))), ("", None))


def _code_of_the_folder(config: PretrainedConfig) -> Refused | None:
    module = type(config).__module__
    if module.startswith("transformers."):
        return None
    return Refused(
        f"its code ({module}) is not part of transformers, and code from a folder is never run",
        "choose a model that transformers itself implements",
    )


def _encoder_and_decoder(config: PretrainedConfig) -> Refused | None:
    if not config.is_encoder_decoder:
        return None
    return Refused("it is an encoder with a decoder, which reads the encoder's output")


def _cross_attention(config: PretrainedConfig) -> Refused | None:
    name, _ = _setting(config, "add_cross_attention", "cross_attention_layers")
    return Refused(f"its layers attend to another sequence ({name}), and there is none") if name else None


def _several_models(config: PretrainedConfig) -> Refused | None:
    others = [name for name in config.sub_configs if name.endswith(_OTHER_MODELS)]
    if not others and config.get_text_config() is config:
        return None
    return Refused(
        f"it is made of several models ({', '.join(others or config.sub_configs)}), and text alone is trained here",
        "save its text model, with its text_config, as a folder of its own",
    )


def _later_tokens(config: PretrainedConfig) -> Refused | None:
    for name, value in (("is_causal", False), ("causal", False), ("prefix_lm", True)):
        if getattr(config, name, None) is value:
            return Refused(f"its tokens attend to later ones ({name}={value}), and a stream is causal")
    name, value = _setting(config, "use_bidirectional_attention")
    if not name:
        return None
    return Refused(
        f"its tokens attend to later ones ({name}={value!r}), and a stream is causal",
        f"set {name} to null in config.json if the model is meant to be causal",
    )


def _layers_with_state(config: PretrainedConfig) -> Refused | None:
    name, kinds = _setting(config, *_KINDS_OF_LAYERS)
    kinds = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list | tuple) else []
    found = [kind for kind in kinds if any(each in kind for each in _WITH_STATE)]
    if not found:
        return None
    return Refused(
        f"{len(found)} of its {len(kinds)} layers carry a state from token to token, beside attention or in its place "
        f"({name}: {', '.join(sorted(set(found)))}), which is not streamed"
    )


def _inputs_of_layers(config: PretrainedConfig) -> Refused | None:
    name, size = _setting(config, "hidden_size_per_layer_input")
    if not name:
        return None
    return Refused(
        f"every layer reads an embedding of its own ({name}={size}), whose gradient would flow through an argument of "
        "the layer, and arguments are not differentiated"
    )


def _shared_keys(config: PretrainedConfig) -> Refused | None:
    name, count = _setting(config, "num_kv_shared_layers")
    if not name:
        return None
    return Refused(
        f"its last layers attend to the keys of earlier ones ({name}={count}), and each attends to its own here"
    )


def _biases_of_positions(config: PretrainedConfig) -> Refused | None:
    has_alibi = any(_setting(each, "alibi")[1] for each in (config, getattr(config, "attn_config", None)))
    if not has_alibi and config.model_type != "bloom":
        return None
    return Refused("it adds a bias to every attention score (ALiBi), which no kernel here knows")


def _dropped_layers(config: PretrainedConfig) -> Refused | None:
    name, share = _setting(config, "layerdrop", "decoder_layerdrop")
    return Refused(f"it skips layers at random ({name}={share})", f"set {name} to 0 in config.json") if name else None


def _no_heads(config: PretrainedConfig) -> Refused | None:
    if hasattr(config, "num_attention_heads"):
        return None
    return Refused("it has no attention heads (no num_attention_heads in its configuration)")


RULES: tuple[Rule, ...] = (
    _code_of_the_folder,
    _encoder_and_decoder,
    _cross_attention,
    _several_models,
    _later_tokens,
    _layers_with_state,
    _inputs_of_layers,
    _shared_keys,
    _biases_of_positions,
    _dropped_layers,
    _no_heads,
)
