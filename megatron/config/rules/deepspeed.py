"""Rules for the DeepSpeed JSON: it must agree with the flags, and every key in it must have an effect.

DeepSpeed itself ignores a key that it does not know, so a misspelled one is caught here, at any depth.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.batch import accumulation_steps
from megatron.config.deepspeed_json import SHARED_SETTINGS, SharedSetting, lookup, zero_stage_run
from megatron.config.deepspeed_keys import DEEPSPEED_KEYS, Keys
from megatron.config.rules.common import Rule, Run, flag, listed

OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}


def json_has_known_keys(run: Run) -> str | None:
    return next(_key_faults(run.config.deepspeed_json, DEEPSPEED_KEYS, "", _file(run)), None)


def _key_faults(block: Mapping[str, Any], known: Keys, above: str, file: str) -> Iterator[str]:
    for name, value in block.items():
        key, path = known.get(name), above + name
        if isinstance(key, Mapping):
            if isinstance(value, Mapping):
                yield from _key_faults(value, key, f"{path}.", file)
            elif value is not None:
                yield f'"{path}" ({json.dumps(value)}) in {file} must be an object of {listed(tuple(key), "or")}'
        elif key is None:
            honored = [name for name, key in known.items() if isinstance(key, Mapping) or key.values != ()]
            close = difflib.get_close_matches(name, honored, n=1)
            advice = f'did you mean "{close[0]}"?' if close else "remove it"
            yield f'"{path}" in {file} is not a key that is honored here; {advice}'
        elif key.values == ():
            yield f'"{path}" in {file} is not read from there; remove it: {key.advice}'
        elif value != "auto" and not key.allows(value):
            allowed = " or ".join(json.dumps(allowed) for allowed in key.values or ())
            yield f'"{path}" ({json.dumps(value)}) in {file} must be {allowed}: {key.advice}; correct it or remove it'


def json_keeps_the_gradient_exact(run: Run) -> str | None:
    """Check the conditions that DeepSpeed imposes or that `tests/distributed/test_deepspeed_keys.py` covers."""
    stated, stage = run.config.deepspeed_json, zero_stage_run(run.config)
    precision = run.config.precision
    own = "bf16" if precision.bf16 else "fp16" if precision.fp16 else "fp32"
    accumulated = lookup(stated, ("data_types", "grad_accum_dtype"))
    allowed = " or ".join(dict.fromkeys([f'"{own}"', '"fp32"']))
    if accumulated not in (None, "auto", own, "fp32"):
        return (
            f'"data_types.grad_accum_dtype" ("{accumulated}") in {_file(run)} must be {allowed}; correct it or '
            "remove it"
        )
    reduced = lookup(stated, ("communication_data_type",))
    if reduced not in (None, "auto", own, "fp32"):
        return (
            f'"communication_data_type" ("{reduced}") in {_file(run)} must be {allowed}, so that the sum of '
            "the gradients loses no precision; correct it or remove it"
        )
    if lookup(stated, ("prescale_gradients",)) and stage > 1:
        return (
            f'"prescale_gradients" (true) in {_file(run)} needs --zero-stage 0 or 1, and it is {stage}; remove it: the '
            "gradient is the mean over the ranks either way"
        )
    return None


def json_agrees_with_flags(run: Run) -> str | None:
    return next(filter(None, (_disagreement(setting, run) for setting in SHARED_SETTINGS)), None)


def _disagreement(setting: SharedSetting, run: Run) -> str | None:
    stated = setting.in_file(run.config.deepspeed_json)
    value = setting.in_config(run.config)
    if stated is None or stated == value:
        return None
    written = json.dumps(lookup(run.config.deepspeed_json, setting.path))
    name = flag(setting.attribute)
    if isinstance(stated, bool):
        change = f"add {name}" if stated else f"remove {name}"
        is_given = "given" if value else "not given"
        return (
            f'"{setting.name}" ({written}) in {_file(run)} must agree with {name}, which is {is_given}; correct '
            f"the file or {change}"
        )
    return (
        f'"{setting.name}" ({written}) in {_file(run)} must agree with {name} ({_number(value)}); '
        f"remove it from the file or give {name} {_number(stated)}"
    )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def json_agrees_on_accumulation(run: Run) -> str | None:
    stated = lookup(run.config.deepspeed_json, ("gradient_accumulation_steps",))
    steps = accumulation_steps(run.config, run.world_size)
    if stated in (None, "auto", steps):
        return None
    message = (
        f'"gradient_accumulation_steps" ({json.dumps(stated)}) in {_file(run)} must be --global-batch-size / '
        "(--micro-batch-size x "
        f"data-parallel size) = {steps}; remove it from the file"
    )
    if isinstance(stated, int) and stated > 0:
        message += (
            f" or give --global-batch-size {stated * run.config.training.micro_batch_size * run.data_parallel_size}"
        )
    return message


def json_leaves_nothing_automatic(run: Run) -> str | None:
    shared = {setting.path for setting in SHARED_SETTINGS} | {("gradient_accumulation_steps",)}
    for path in _automatic(run.config.deepspeed_json):
        if path not in shared:
            return (
                f'"{".".join(path)}" ("auto") in {_file(run)} must have a value, because it is not filled in here; '
                "write one, or remove it for DeepSpeed's default"
            )
    return None


def _automatic(block: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _automatic(value, (*above, key))
        elif value == "auto":
            yield (*above, key)


def offload_has_its_zero_stage(run: Run) -> str | None:
    stage = run.config.deepspeed.zero_stage
    for key, stages in OFFLOAD_STAGES.items():
        device = lookup(run.config.deepspeed_json, ("zero_optimization", key, "device"))
        if device not in (None, "none") and stage not in stages:
            return (
                f'"zero_optimization.{key}" in {_file(run)} needs --zero-stage {listed(stages)}, and it is {stage}; '
                f"give --zero-stage {stages[-1]} or remove {key}"
            )
    if run.config.deepspeed.cpu_optimizer and stage == 0:
        return (
            "--cpu-optimizer needs --zero-stage 1, 2 or 3, and it is 0; give --zero-stage 1 or remove --cpu-optimizer"
        )
    return None


def cpu_optimizer_agrees_with_json(run: Run) -> str | None:
    device = lookup(run.config.deepspeed_json, ("zero_optimization", "offload_optimizer", "device"))
    if not run.config.deepspeed.cpu_optimizer or device in (None, "cpu"):
        return None
    return (
        f'"zero_optimization.offload_optimizer.device" ("{device}") in {_file(run)} must be "cpu" with '
        "--cpu-optimizer; "
        "remove one of the two"
    )


def adapters_are_not_on_nvme(run: Run) -> str | None:
    device = lookup(run.config.deepspeed_json, ("zero_optimization", "offload_optimizer", "device"))
    if device != "nvme" or not run.config.adapters.is_used:
        return None
    return (
        f'"zero_optimization.offload_optimizer.device" ("nvme") in {_file(run)} is for states that memory cannot hold, '
        "and those of adapters are small: only DeepSpeed can read them there, and it needs the frozen weights, too; "
        "remove it"
    )


def _file(run: Run) -> str:
    return run.config.deepspeed.deepspeed_config or "the DeepSpeed JSON"


DEEPSPEED_RULES: tuple[Rule, ...] = (
    json_has_known_keys,
    json_keeps_the_gradient_exact,
    json_agrees_with_flags,
    json_agrees_on_accumulation,
    json_leaves_nothing_automatic,
    offload_has_its_zero_stage,
    cpu_optimizer_agrees_with_json,
    adapters_are_not_on_nvme,
)
