"""Settings that the folder of --hf-model defines, and the choice of what a run of it leaves open.

    config.json     sizes of the model (megatron.hf.sizes), dropout, positions
    tokenizer       unless a tokenizer flag is given
    left open       FPDT with offloading, as many ranks per sequence as its length and the batch allow, ZeRO-3

transformers' own class of the architecture is used, never code from the folder. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config import AdaptersConfig, Config, ConfigError, HuggingFaceModelConfig, ModelConfig, TokenizerConfig
from megatron.config.deepspeed_json import lookup
from megatron.config.packages import require_package
from megatron.config.rules.common import Rule, Run, listed
from megatron.config.rules.effects import TOKENIZER_SETTINGS
from megatron.config.rules.names import NAME_RULES
from megatron.config.rules.parallel import sequence_parallel_sizes
from megatron.config.rules.ranges import RANGES, in_range
from megatron.core.json_text import parse_object
from megatron.tokenizer import tokenizer_settings_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron.hf.sizes import Description

CONFIG_FILE = "config.json"
# Of transformers' configuration: what is not worth storing.
_UNSTORED = ("id2label", "label2id", "quantization_config", "_name_or_path")
# Read here, to choose the ranks per sequence and to count adapters, before other rules are checked.
_NEEDED = ("seq_length", "micro_batch_size", "global_batch_size", "lora_rank", "lora_alpha", "lora_dropout")
_OF_OTHER_MODELS = ("classifier", "summary", "cls")  # that share a config.json, such as one that classifies


def with_hugging_face_model(config: Config, world_size: int) -> Config:
    """Return the configuration with what the folder of --hf-model defines, and with what the run leaves open chosen.

    Without --hf-model it is returned as it is. Reads the folder's files, not its weights.

    Raises:
        ConfigError: there is no such folder, or its model cannot be trained here.
    """
    if config.model.hf_model is None:
        return config
    run = Run(config, world_size, "cuda")
    rules: list[Rule] = [*NAME_RULES, *(partial(in_range, name, RANGES[name]) for name in _NEEDED)]
    for rule in rules:
        if message := rule(run):
            raise ConfigError(message)
    folder = Path(config.model.hf_model)
    if folder.is_file():
        raise ConfigError(f"--hf-model ({folder}) is a file; name the folder that it is in")
    model = read_model(folder, config.model, config.given)
    if config.adapters.is_used:
        config, model = _with_adapters(config, model)
    chosen = _with_parallelism(replace(config, model=model, tokenizer=_tokenizer(config, folder)), world_size)
    return replace(chosen, notes=(*config.notes, *_notes(config, chosen, model)))


def _with_adapters(config: Config, model: HuggingFaceModelConfig) -> tuple[Config, HuggingFaceModelConfig]:
    """Return both with all settings of the adapters, and with their sizes."""
    require_package("peft", "--lora-rank" if config.adapters.load_adapter is None else "--load-adapter")
    from megatron.hf.adapter_settings import with_settings_of_folder  # imports peft

    adapters = with_settings_of_folder(config.adapters)
    model = with_adapters(model, adapters)
    trained = model.counted.adapters.weights if model.counted.adapters else 0
    kind = "DoRA" if adapters.use_dora else "LoRA"
    note = f"{kind} of rank {adapters.lora_rank}: {trained / 1e6:.1f} million parameters are trained, all others frozen"
    if model.counted.adapters and (quantized := model.counted.adapters.quantized_weights):
        note += f", {_in_words(quantized)} of these in NF4, by bitsandbytes"
    return replace(config, adapters=adapters, notes=(*config.notes, note)), model


def with_adapters(model: HuggingFaceModelConfig, adapters: AdaptersConfig) -> HuggingFaceModelConfig:
    """Return the model with the sizes of its adapters. ConfigError if they do not fit it."""
    from megatron.hf.adapter_settings import adapter_sizes  # imports peft

    counted = replace(model.counted, adapters=adapter_sizes(_config_of(model.hf_config), adapters))
    return replace(model, counted=counted)


def read_model(path: Path, flags: ModelConfig, given: frozenset[str] = frozenset()) -> HuggingFaceModelConfig:
    """Return the settings of the model in a folder, or of a config.json, with the flags that the run keeps.

    ConfigError if it cannot be trained here.
    """
    require_package("transformers", f"--hf-model ({path})")
    return _model_of(_read_config(path), path, flags, given)


def model_of_config(content: Mapping[str, Any], name: str, seq_length: int) -> HuggingFaceModelConfig:
    """Return the settings of the model `name` that the content of a config.json describes, at a length."""
    require_package("transformers", name)
    flags = ModelConfig(hf_model=name, num_layers=0, hidden_size=0, num_attention_heads=0, seq_length=seq_length)
    return _model_of(_config_of(content), name, flags, frozenset())


def _model_of(
    theirs: PretrainedConfig, path: Path | str, flags: ModelConfig, given: frozenset[str]
) -> HuggingFaceModelConfig:
    _refuse(theirs)
    _set_dropout(theirs, flags, given)
    described = _describe(theirs, path)
    settings = {member.name: getattr(flags, member.name) for member in fields(ModelConfig)}
    layers, learned = described.layers, described.learned_positions
    longest = getattr(theirs, "max_position_embeddings", None) or 0
    settings |= {
        "num_layers": len(layers),
        "hidden_size": described.hidden_size,
        "ffn_hidden_size": described.sizes.mlp_width,
        "num_attention_heads": layers[0].num_heads,
        "num_key_value_heads": layers[0].num_key_value_heads,
        "kv_channels": max(layer.head_size for layer in layers),
        "max_position_embeddings": longest if learned else max(longest, flags.seq_length),
        "use_rotary_position_embeddings": not learned,
        "untie_embeddings_and_output_weights": described.untied,
        "attention_dropout": max(layer.dropout for layer in layers),
        "hidden_dropout": max(_dropout_of(theirs, of_attention=False).values(), default=0.0),
    }
    return HuggingFaceModelConfig(
        **settings, hf_config=_stored(theirs), embedding_rows=described.vocab_size, counted=described.sizes
    )


def transformers_config(model: HuggingFaceModelConfig) -> PretrainedConfig:
    """Return transformers' configuration of a run's model: the folder's.

    Where positions come from a table that is computed, not learned, it has rows for the run's length. RoPE of
    `rope_parameters` has no table, and some types derive frequencies from the length that config.json states.
    """
    theirs = _config_of(model.hf_config)
    has_table = model.use_rotary_position_embeddings and not getattr(theirs, "rope_parameters", None)
    if has_table and getattr(theirs, "max_position_embeddings", None):
        theirs.max_position_embeddings = max(theirs.max_position_embeddings, model.seq_length)
    return theirs


def _read_config(path: Path) -> PretrainedConfig:
    """Read config.json as transformers does; ConfigError unless it is of a language model that transformers has."""
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        reason = f"has no {CONFIG_FILE}" if path.is_dir() else "is no folder"
        raise ConfigError(
            f"--hf-model ({path}) {reason}, and nothing is downloaded; name the folder of a Hugging Face model, for "
            "example one that `hf download NAME --local-dir FOLDER` wrote"
        )
    try:
        content = parse_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); copy it again") from error
    _require_known_model(content, file)
    try:
        return _config_of(content)
    except Exception as error:  # transformers' own checks raise errors of many types
        raise ConfigError(
            f"{file} describes no {content['model_type']} to transformers ({_first_line(error)}); correct it"
        ) from error


def _require_known_model(content: Mapping[str, Any], file: Path) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{file} has no model_type; name the folder of a Hugging Face model with --hf-model")
    if model_type not in CONFIG_MAPPING:
        code = " and the code in the folder (auto_map) is never run" if "auto_map" in content else ""
        raise ConfigError(
            f"{file} has model_type {model_type!r}, which the installed transformers does not have{',' * bool(code)}"
            f"{code}; use a model that it has, or another version of it"
        )
    if isinstance(content.get("text_config"), dict):
        raise ConfigError(
            f"{file} has model_type {model_type!r}, whose language model (text_config) is only one of its parts; save "
            "its language model as a folder of its own with transformers, and name that with --hf-model"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or content.get("is_encoder_decoder"):
        raise ConfigError(
            f"{file} has model_type {model_type!r}, which is no causal language model; name the folder of one"
        )


def _config_of(content: Mapping[str, Any]) -> PretrainedConfig:
    from megatron.hf.empty_model import parse_config  # which imports transformers

    return parse_config(content)


def _refuse(theirs: PretrainedConfig) -> None:
    from megatron.hf.refusals import refuse  # which imports transformers

    refuse(theirs)


def _stored(theirs: PretrainedConfig) -> dict[str, Any]:
    """Return a configuration as plain values, with the defaults of its class."""
    content = json.loads(theirs.to_json_string(use_diff=False))
    return {name: value for name, value in sorted(content.items()) if name not in _UNSTORED}


def _describe(theirs: PretrainedConfig, path: Path | str) -> Description:
    from megatron.hf.sizes import describe

    try:
        described = describe(theirs)
    except Exception as error:  # of any model that transformers has
        raise ConfigError(
            f"--hf-model ({path}) is a {theirs.model_type}, which is not streamed: {_first_line(error)}; use a "
            "decoder whose layers call attention once each, through transformers' attention interface"
        ) from error
    for what in ("num_heads", "num_key_value_heads"):
        numbers = sorted({getattr(layer, what) for layer in described.layers})
        if len(numbers) > 1:
            raise ConfigError(
                f"--hf-model ({path}) has layers with {listed(numbers, 'and')} {what.removeprefix('num_')}, and all "
                "layers of a stream have equally many; use another model"
            )
    return described


def _dropout_of(theirs: PretrainedConfig, of_attention: bool) -> dict[str, float]:
    """Return the probabilities of dropout that a configuration has, by name: those of attention, or the others."""
    found = {
        name: value
        for name, value in theirs.to_dict().items()
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {
        name: value
        for name, value in found.items()
        if name != "layerdrop" and not name.startswith(_OF_OTHER_MODELS) and ("att" in name) == of_attention
    }


def _set_dropout(theirs: PretrainedConfig, flags: ModelConfig, given: frozenset[str]) -> None:
    """Set the dropout that flags give. ConfigError for dropout that the model lacks."""
    for flag, of_attention in (("attention_dropout", True), ("hidden_dropout", False)):
        value = getattr(flags, flag)
        if flag not in given:
            continue
        names = list(_dropout_of(theirs, of_attention))
        if value and not names:
            raise ConfigError(
                f"--{flag.replace('_', '-')} ({value:g}) has no effect on a {theirs.model_type}, which has no such "
                "dropout; remove it"
            )
        for name in names:
            setattr(theirs, name, value)


def _tokenizer(config: Config, folder: Path) -> TokenizerConfig:
    """Return the tokenizer of the folder, unless flags name one."""
    if not config.given.isdisjoint(("tokenizer_type", *TOKENIZER_SETTINGS)):
        return config.tokenizer
    return tokenizer_settings_in(folder)


def _with_parallelism(config: Config, world_size: int) -> Config:
    """Choose what no flag and no DeepSpeed JSON gives: FPDT, offloading, ranks per sequence, ZeRO stage."""
    parallel, dropout = config.parallel, config.model.attention_dropout
    if parallel.ds_sequence_parallel_fpdt or not dropout:
        parallel = replace(parallel, ds_sequence_parallel_fpdt=True, ds_sequence_parallel_fpdt_offloading=True)
    config = replace(config, parallel=parallel)
    if "ds_sequence_parallel_size" not in config.given:
        sizes = sequence_parallel_sizes(Run(config, world_size, "cuda"))
        if dropout:
            sizes = [size for size in sizes if config.model.num_attention_heads % size == 0]
        parallel = replace(parallel, ds_sequence_parallel_size=max(sizes, default=1))
    stated = lookup(config.deepspeed_json, ("zero_optimization", "stage"))
    stage_is_given = "zero_stage" in config.given or stated not in (None, "auto")
    deepspeed = config.deepspeed if stage_is_given or world_size == 1 else replace(config.deepspeed, zero_stage=3)
    return replace(config, parallel=parallel, deepspeed=deepspeed)


def _notes(before: Config, chosen: Config, model: HuggingFaceModelConfig) -> Iterator[str]:
    """Yield lines for the log: the model, what was chosen, and positions beyond those it was trained at."""
    weights, outside = model.counted, model.embedding_rows * model.hidden_size
    outside += model.counted.outer_weights + outside * model.untie_embeddings_and_output_weights
    total, active = weights.all_block_weights + outside, weights.token_weights.total + outside
    of_a_token = f", {_in_words(active)} of them for a token" if active < total else ""
    yield (
        f"--hf-model ({model.hf_model}): {model.model_type}, {model.num_layers} layers, {_in_words(total)} "
        f"parameters{of_a_token}"
    )
    given = [
        *_changed(before.parallel, chosen.parallel),
        *_changed(before.deepspeed, chosen.deepspeed),
        *_changed(before.tokenizer, chosen.tokenizer),
    ]
    if given:
        yield f"chosen with --hf-model: {' '.join(given)}"
    if not chosen.parallel.ds_sequence_parallel_fpdt:
        yield (
            f"without FPDT, which cannot replay the dropout of attention ({model.attention_dropout:g}) in config.json; "
            "--attention-dropout 0 streams the model"
        )
    longest = getattr(_config_of(model.hf_config), "max_position_embeddings", None)
    if model.use_rotary_position_embeddings and isinstance(longest, int) and model.seq_length > longest:
        yield (
            f"--seq-length ({model.seq_length}) exceeds max_position_embeddings ({longest}) in config.json: the model "
            f"was not trained at such positions, and its RoPE applies there as it is ({_rope(model)}); a longer one "
            "is set by rope_parameters in config.json"
        )


def _changed(before: Any, after: Any) -> Iterator[str]:
    """Yield flags for the settings that differ."""
    for member in fields(after):
        value = getattr(after, member.name)
        if value != getattr(before, member.name) and value is not None:
            flag = f"--{member.name.replace('_', '-')}"
            yield flag if value is True else f"{flag} {value}"


def _in_words(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _rope(model: HuggingFaceModelConfig) -> str:
    rope = model.hf_config.get("rope_parameters") or {}
    return ", ".join(f"{name} {value}" for name, value in rope.items()) or "no settings"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
