"""The check of a Hugging Face model before a run allocates anything: rank 0 checks, and all ranks hear its verdict."""

from __future__ import annotations

import torch.distributed as dist

from megatron.config import Config, ConfigError, HuggingFaceModelConfig
from megatron.initialize import Context


def check_model(config: Config, context: Context) -> None:
    """Compare a small copy of a Hugging Face model with transformers, in seconds. Collective over all ranks.

    ConfigError on every rank if the model would be trained wrongly, or cannot be streamed.
    """
    if not isinstance(config.model, HuggingFaceModelConfig):
        return
    with context.watchdog.working("comparing a small copy of the model with transformers"):
        fault = [_fault(config.model, context) if context.is_first_rank else None]
        if context.parallel_state.world_size > 1:
            dist.broadcast_object_list(fault, src=0, device=context.device)
    if fault[0] is not None:
        raise ConfigError(fault[0])


def _fault(model: HuggingFaceModelConfig, context: Context) -> str | None:
    """Check the model, and log that it is right; return what is wrong with it, if anything is."""
    from megatron.hf.proof import prove  # which imports transformers, and native models do not need that
    from megatron.hf.settings import transformers_config

    try:
        context.log.info("%s", prove(transformers_config(model)).line)
    except ConfigError as error:
        return str(error)
    return None
