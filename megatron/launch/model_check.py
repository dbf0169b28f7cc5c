"""The check of a Hugging Face model before a run allocates anything: rank 0 checks, and all ranks hear its verdict."""

from __future__ import annotations

import torch.distributed as dist

from megatron.config import Config, ConfigError, HuggingFaceModelConfig
from megatron.initialize import Context


def check_model(config: Config, context: Context) -> str:
    """Compare a small copy of a Hugging Face model with transformers, in seconds. Collective over all ranks.

    Return how well they agree, on rank 0; "" on the other ranks and for native models. ConfigError on every rank if the
    model would be trained wrongly, or cannot be streamed.
    """
    if not isinstance(config.model, HuggingFaceModelConfig):
        return ""
    agreement, fault = "", ""
    with context.watchdog.working("comparing a small copy of the model with transformers"):
        if context.is_first_rank:
            agreement, fault = _verdict(config.model)
        shared = [fault]
        if context.parallel_state.world_size > 1:
            dist.broadcast_object_list(shared, src=0, device=context.device)
    if shared[0]:
        raise ConfigError(shared[0])
    return agreement


def _verdict(model: HuggingFaceModelConfig) -> tuple[str, str]:
    """Return how well the model agrees with transformers, and what is wrong with it; one of them is ""."""
    from megatron.hf.proof import prove  # which imports transformers, and native models do not need that
    from megatron.hf.settings import transformers_config

    try:
        return prove(transformers_config(model)).line, ""
    except ConfigError as error:
        return "", str(error)
