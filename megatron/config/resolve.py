"""From what the user said to what it means: the last step before a configuration is fixed for good."""

from dataclasses import replace

from megatron.config.config import Config
from megatron.config.deepspeed_json import adopt, read_deepspeed_json
from megatron.config.errors import ConfigError
from megatron.config.model import AttentionBackend, ModelConfig
from megatron.config.rules.common import flag

# Megatron's flag: the backend that it means, and narrower ones that agree with it.
FLASH_ATTENTION_VERSIONS: dict[str, tuple[AttentionBackend, ...]] = {
    "use_flash_attn_v2": ("flash-2", "flash-attn-2", "torch-flash"),
    "use_flash_attn_v3": ("flash-attn-3",),
    "use_flash_attn_v4": ("flash-attn-4",),
}
FLASH_ATTENTION_REFUSED = {
    "use_flash_attn_v1": "FlashAttention-1, which no longer exists",
    "use_flash_attn_triton": "FlashAttention in Triton, which is not here",
}


def resolve(config: Config) -> Config:
    """Return the configuration with every derived value filled in; reads the file of --deepspeed-config.

    Raises:
        ConfigError: the file is unusable, or flags contradict each other.
    """
    if config.deepspeed.deepspeed_config is not None:
        config = adopt(replace(config, deepspeed_json=read_deepspeed_json(config.deepspeed.deepspeed_config)))
    checkpointing = config.deepspeed.deepspeed_activation_checkpointing or config.deepspeed.checkpoint_activations
    return replace(
        config,
        model=replace(config.model.resolved(), attention_backend=attention_backend(config.model)),
        deepspeed=replace(
            config.deepspeed, deepspeed_activation_checkpointing=checkpointing, checkpoint_activations=checkpointing
        ),
    )


def attention_backend(model: ModelConfig) -> AttentionBackend:
    """Return the backend that --attention-backend and the --use-flash-attn flags agree on.

    Raises:
        ConfigError: they do not agree, or ask for what is not here.
    """
    for name, reason in FLASH_ATTENTION_REFUSED.items():
        if getattr(model, name):
            raise ConfigError(
                f"{flag(name)} asks for {reason}; use --use-flash-attn-v2, or leave the choice to "
                "--attention-backend auto"
            )
    versions = [name for name in FLASH_ATTENTION_VERSIONS if getattr(model, name)]
    if not versions:
        return model.attention_backend
    named = () if model.attention_backend == "auto" else (f"--attention-backend {model.attention_backend}",)
    family = FLASH_ATTENTION_VERSIONS[versions[0]]
    if len(versions) > 1 or (named and model.attention_backend not in family):
        asked = [*map(flag, versions), *named]
        raise ConfigError(f"{' and '.join(asked)} ask for different attention kernels; keep one of them")
    return model.attention_backend if named else family[0]
