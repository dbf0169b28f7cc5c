"""Translation of Megatron-DeepSpeed flags that set an existing setting in another form."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron.config.config import Config
from megatron.config.errors import ConfigError
from megatron.config.rules.common import given_flags, shown

TAG = re.compile(r"global_step(\d{1,10})")
STEPS = re.compile(r"(\d{1,10}),(\d{1,10})")


def in_own_spelling(config: Config) -> Config:
    """Return the configuration with those flags translated to the settings that they stand for.

    Raises:
        ConfigError: a value has another form, or a flag of the other spelling is given as well.
    """
    return _checkpoint_of_tag(_profile_of_steps(_checkpointing_of_granularity(config)))


def _checkpoint_of_tag(config: Config) -> Config:
    tag = config.checkpoint.load_tag
    if tag is None:
        return config
    _require_one_spelling(config, "load_tag", "ckpt_step")
    match = TAG.fullmatch(tag)
    if match is None:
        raise ConfigError(
            f"{shown(config, 'load_tag')} must be the name of a checkpoint, such as global_step100; give one, or "
            "remove it for the newest"
        )
    return replace(config, checkpoint=replace(config.checkpoint, ckpt_step=int(match[1])))


def _profile_of_steps(config: Config) -> Config:
    steps = config.logging.profile_steps
    if steps is None:
        return config
    _require_one_spelling(config, "profile_steps", "profile_step_start", "profile_step_end")
    match = STEPS.fullmatch(steps)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"{shown(config, 'profile_steps')} must be the first and the last iteration to profile; give for example "
            "--profile-steps 2,3"
        )
    return replace(config, logging=replace(config.logging, profile_step_start=first - 1, profile_step_end=last))


def _checkpointing_of_granularity(config: Config) -> Config:
    settings = config.deepspeed
    checkpointing = (
        settings.deepspeed_activation_checkpointing
        or settings.checkpoint_activations
        or settings.recompute_granularity == "full"
    )
    settings = replace(settings, deepspeed_activation_checkpointing=checkpointing, checkpoint_activations=checkpointing)
    return replace(config, deepspeed=settings)


def _require_one_spelling(config: Config, name: str, *others: str) -> None:
    for other in given_flags(config, others):
        raise ConfigError(f"{shown(config, name)} and {shown(config, other)} set the same thing; keep one of them")
