"""The DeepSpeed JSON: the user's file, and the dict that is passed to DeepSpeed.

Some settings can be set both by a flag and in the file (`SHARED_SETTINGS`). The file sets them where the flag is not
given (`adopt`); where both are given they must agree (checked in `megatron.config.rules.deepspeed`).

DeepSpeed is configured with one flat data-parallel world of all ranks, sequence-parallel ones included, so its
train_batch_size counts each sequence once per rank that shares it. The user's file states the true global batch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.config.batch import accumulation_steps
from megatron.config.config import Config
from megatron.config.errors import ConfigError

NEVER = 10**9


@dataclass(frozen=True)
class SharedSetting:
    """One setting that has both a flag and a key in the file.

    `other_flags` names other flags that set it too; an `fp16_only` setting is ignored where the file does not enable
    fp16.
    """

    path: tuple[str, ...]
    section: str
    attribute: str
    types: tuple[type, ...]
    convert: Callable[[Any], Any] = lambda value: value
    other_flags: tuple[str, ...] = ()
    fp16_only: bool = False

    @property
    def name(self) -> str:
        """The key's path in the file, joined by dots."""
        return ".".join(self.path)

    def in_config(self, config: Config) -> Any:
        """Return the value that the flags (or the file, once adopted) gave."""
        return getattr(getattr(config, self.section), self.attribute)

    def in_file(self, stated: Mapping[str, Any]) -> Any:
        """Return the file's value converted to the flag's, or None where the file does not set it."""
        value = lookup(stated, self.path)
        if value is None or value == "auto" or (self.fp16_only and lookup(stated, ("fp16", "enabled")) is not True):
            return None
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types):
            wanted = " or ".join(_TYPE_NAMES[kind] for kind in self.types)
            raise ConfigError(
                f'"{self.name}" ({json.dumps(value)}) in the DeepSpeed JSON must be {wanted}; correct it or remove it, '
                f"and give --{self.attribute.replace('_', '-')} instead"
            )
        return self.convert(value)

    def flag_given(self, config: Config) -> bool:
        """Whether the user gave a flag that sets it."""
        return bool(config.given & {self.attribute, *self.other_flags})


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}
_NUMBER = (int, float)

# DeepSpeed's defaults, in numbers of parameters.
DEFAULT_PREFETCH = 50_000_000
DEFAULT_LIVE_PARAMETERS = 1_000_000_000

SHARED_SETTINGS = (
    SharedSetting(("train_batch_size",), "training", "global_batch_size", (int,)),
    SharedSetting(("train_micro_batch_size_per_gpu",), "training", "micro_batch_size", (int,)),
    SharedSetting(("gradient_clipping",), "optimizer", "clip_grad", _NUMBER, float),
    SharedSetting(("zero_optimization", "stage"), "deepspeed", "zero_stage", (int,)),
    SharedSetting(("fp16", "enabled"), "precision", "fp16", (bool,), other_flags=("bf16",)),
    SharedSetting(("bf16", "enabled"), "precision", "bf16", (bool,), other_flags=("fp16",)),
    SharedSetting(
        ("fp16", "loss_scale"), "precision", "loss_scale", _NUMBER, lambda scale: float(scale) or None, fp16_only=True
    ),
    SharedSetting(
        ("fp16", "initial_scale_power"),
        "precision",
        "initial_loss_scale",
        (int,),
        lambda power: 2.0 ** max(min(power, 1000), -1000),
        fp16_only=True,
    ),
    SharedSetting(("fp16", "loss_scale_window"), "precision", "loss_scale_window", (int,), fp16_only=True),
    SharedSetting(("fp16", "hysteresis"), "precision", "hysteresis", (int,), fp16_only=True),
    SharedSetting(("fp16", "min_loss_scale"), "precision", "min_loss_scale", _NUMBER, fp16_only=True),
)


def lookup(stated: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Return the value at a path of keys, or None where there is none."""
    value: Any = stated
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """Return the content of a DeepSpeed JSON.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or is not an object of objects where DeepSpeed wants them.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--deepspeed-config ({path}) cannot be read ({error.strerror}); give the path of a JSON file, or "
            "leave the flag out"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed-config ({path}) is not valid JSON ({error}); correct the file") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--deepspeed-config ({path}) must hold a JSON object, not a {type(content).__name__}; wrap it in {{}}"
        )
    for block in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(content.get(block, {}), dict):
            raise ConfigError(
                f'"{block}" ({json.dumps(content[block])}) in {path} must be an object; write "{block}": {{...}} '
                "with its settings"
            )
    return content


def adopt(config: Config) -> Config:
    """Return the configuration with the file's values where no flag is given.

    Raises:
        ConfigError: a value in the file is of the wrong type.
    """
    for setting in SHARED_SETTINGS:
        value = setting.in_file(config.deepspeed_json)
        if value is None or setting.flag_given(config):
            continue
        section = replace(getattr(config, setting.section), **{setting.attribute: value})
        config = replace(config, **{setting.section: section})
    return config


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`: the user's file with this run's values in it.

    The values must have passed `megatron.config.checks.validate`. `world_size` counts all ranks.
    """
    merged = copy.deepcopy(dict(config.deepspeed_json))
    micro_batch = config.training.micro_batch_size
    steps = accumulation_steps(config, world_size)
    merged |= {
        "train_batch_size": micro_batch * steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": _zero_block(config, merged.get("zero_optimization", {})),
        "bf16": _precision_block(config.precision.bf16, merged.get("bf16", {})),
        "fp16": _precision_block(config.precision.fp16, merged.get("fp16", {}) | _loss_scale(config)),
    }
    merged.setdefault("steps_per_print", NEVER)
    merged.setdefault("wall_clock_breakdown", False)
    return merged


def zero_stage_run(config: Config) -> int:
    """Return the ZeRO stage to run: in half precision stage 0 runs as stage 1, with the same arithmetic.

    DeepSpeed 0.19.8 at stage 0 divides half-precision gradients by a loss scale that it never multiplied the loss by.
    Gradients summed in fp32 run as stage 2: at stage 1 DeepSpeed uses another optimizer with another checkpoint format.
    """
    if not (config.precision.bf16 or config.precision.fp16):
        return config.deepspeed.zero_stage
    in_fp32 = lookup(config.deepspeed_json, ("data_types", "grad_accum_dtype")) == "fp32"
    return max(config.deepspeed.zero_stage, 2 if in_fp32 else 1)


def offloads(config: Config, part: str) -> bool:
    """Whether ZeRO offloads a part ("offload_optimizer" or "offload_param") from the GPU."""
    block = _zero_block(config, config.deepspeed_json.get("zero_optimization", {}))
    return (block.get(part) or {}).get("device", "none") != "none"


def _zero_block(config: Config, stated: dict[str, Any]) -> dict[str, Any]:
    block = stated | {"stage": zero_stage_run(config)}
    if block["stage"] == 3:
        # DeepSpeed's defaults prefetch only a small part of a large block and gather the rest on demand.
        weights = config.model.sizes.block_weights
        block.setdefault("stage3_prefetch_bucket_size", max(weights, DEFAULT_PREFETCH))
        block.setdefault("stage3_max_live_parameters", max(3 * weights, DEFAULT_LIVE_PARAMETERS))
    if config.deepspeed.cpu_optimizer:
        block["offload_optimizer"] = {**stated.get("offload_optimizer", {}), "device": "cpu"}
    return block


def _precision_block(enabled: bool, stated: dict[str, Any]) -> dict[str, Any]:
    return {**stated, "enabled": True} if enabled else {"enabled": False}


def _loss_scale(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's loss-scale settings; a loss scale of 0 means dynamic."""
    precision = config.precision
    return {
        "loss_scale": precision.loss_scale or 0,
        "initial_scale_power": int(precision.initial_loss_scale).bit_length() - 1,
        "loss_scale_window": precision.loss_scale_window,
        "hysteresis": precision.hysteresis,
        "min_loss_scale": precision.min_loss_scale,
    }
