"""Resolution of derived settings: the last step before a configuration is frozen."""

from dataclasses import replace

from megatron.config.config import Config
from megatron.config.deepspeed_json import adopt, read_deepspeed_json
from megatron.config.errors import ConfigError
from megatron.config.model import ARCHITECTURE_FLAGS, AttentionBackendName, ModelConfig
from megatron.config.rules.common import Run, flag, listed, shown
from megatron.config.rules.effects import notes_of
from megatron.config.rules.ranges import RANGES, in_range
from megatron.config.spellings import in_own_spelling

# Megatron's flag: the backend that it selects, then narrower ones that agree with it.
FLASH_ATTENTION_VERSIONS: dict[str, tuple[AttentionBackendName, ...]] = {
    "use_flash_attn_v2": ("flash-2", "flash-attn-2", "torch-flash"),
    "use_flash_attn_v3": ("flash-attn-3",),
    "use_flash_attn_v4": ("flash-attn-4",),
}
DERIVED_WIDTHS = ("ffn_hidden_size", "num_key_value_heads", "kv_channels", "max_position_embeddings")


def resolve(config: Config) -> Config:
    """Return the configuration with every derived value filled in; reads the file of --deepspeed-config.

    Raises:
        ConfigError: the file is unusable, or flags contradict each other.
    """
    if config.deepspeed.deepspeed_config is not None:
        config = adopt(replace(config, deepspeed_json=read_deepspeed_json(config.deepspeed.deepspeed_config)))
    _refuse_architecture_beside_a_folder(config)
    _require_widths_above_zero(config)
    config = in_own_spelling(config)
    return replace(
        config,
        model=replace(config.model.resolved(), attention_backend=attention_backend(config.model)),
        notes=(*config.notes, *notes_of(config)),
    )


def _refuse_architecture_beside_a_folder(config: Config) -> None:
    """Raise for flags that describe an architecture where the folder of --hf-model does."""
    if config.model.hf_model is None:
        return
    beside = sorted(ARCHITECTURE_FLAGS & config.given)
    if beside:
        raise ConfigError(
            f"{listed([shown(config, name) for name in beside], 'and')} would describe again what config.json in "
            f"{shown(config, 'hf_model')} defines; remove {'it' if len(beside) == 1 else 'them'}"
        )


def _require_widths_above_zero(config: Config) -> None:
    """Raise for a width of 0 that the user gave: later code reads 0 as a width to derive from others."""
    for name in DERIVED_WIDTHS:
        message = in_range(name, RANGES[name], Run(config, 1, "cpu")) if name in config.given else None
        if message is not None:
            raise ConfigError(message)


def attention_backend(model: ModelConfig) -> AttentionBackendName:
    """Return the backend that --attention-backend and the --use-flash-attn flags agree on.

    Raises:
        ConfigError: they do not agree.
    """
    versions = [name for name in FLASH_ATTENTION_VERSIONS if getattr(model, name)]
    if not versions:
        return model.attention_backend
    named = () if model.attention_backend == "auto" else (f"--attention-backend {model.attention_backend}",)
    family = FLASH_ATTENTION_VERSIONS[versions[0]]
    if len(versions) > 1 or (named and model.attention_backend not in family):
        requested = [*map(flag, versions), *named]
        raise ConfigError(f"{' and '.join(requested)} ask for different attention kernels; keep one of them")
    return model.attention_backend if named else family[0]
