"""From what the user said to what it means: the last step before a configuration is fixed for good."""

from dataclasses import replace

from megatron.config.config import Config
from megatron.config.deepspeed_json import adopt, read_deepspeed_json
from megatron.config.errors import ConfigError
from megatron.config.model import AttentionBackend, ModelConfig

FLASH_ATTENTION_2: AttentionBackend = "torch-flash"


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
        ConfigError: they do not agree, or ask for FlashAttention-1.
    """
    if model.use_flash_attn_v1:
        raise ConfigError(
            "--use-flash-attn-v1 asks for FlashAttention-1, which no longer exists; use --use-flash-attn-v2, or leave "
            "the choice to --attention-backend auto"
        )
    if not model.use_flash_attn_v2:
        return model.attention_backend
    if model.attention_backend not in ("auto", FLASH_ATTENTION_2):
        raise ConfigError(
            f"--use-flash-attn-v2 and --attention-backend {model.attention_backend} ask for different attention "
            "kernels; keep one of them"
        )
    return FLASH_ATTENTION_2
