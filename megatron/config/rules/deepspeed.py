"""Rules for the DeepSpeed JSON: it must agree with the flags, and every key in it must count.

DeepSpeed itself ignores a key that it does not know, so a misspelt one is caught here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.batch import accumulation_steps
from megatron.config.deepspeed_json import SHARED_SETTINGS, SharedSetting, lookup
from megatron.config.rules.common import Rule, Run, flag, listed

HERE = "training here does not use it"
REFUSED_KEYS = {
    "activation_checkpointing": "give --deepspeed-activation-checkpointing and --checkpoint-in-cpu",
    "amp": "give --bf16 or --fp16",
    "bfloat16": 'call it "bf16"',
    "curriculum_learning": HERE,
    "data_efficiency": HERE,
    "expert_parallel": HERE,
    "optimizer": "give --lr, --weight-decay, --adam-beta1, --adam-beta2 and --adam-eps",
    "pipeline": HERE,
    "progressive_layer_drop": HERE,
    "scheduler": "give --lr-decay-style, --lr-warmup-iters and the like",
    "sequence_parallel_size": "give --ds-sequence-parallel-size",
    "sparse_attention": HERE,
    "tensor_parallel": HERE,
    "torch_autocast": "give --bf16 or --fp16",
}
PASSED_KEYS = frozenset(
    {
        "aio",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "sparse_gradients",
        "steps_per_print",
        "timers",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
UNSAFE_CHECKPOINT_KEYS = {
    "use_node_local_storage": "a checkpoint is complete only in a folder that all machines share",
    "writer": "a checkpoint appears when every file is on the disk, and DeepSpeed's other writers do not wait for that",
}
OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}


def json_has_known_keys(run: Run) -> str | None:
    for key in run.config.deepspeed_json:
        if key in REFUSED_KEYS:
            return f'"{key}" in {_file(run)} is not taken from there; remove it: {REFUSED_KEYS[key]}'
        if key not in PASSED_KEYS:
            close = difflib.get_close_matches(key, PASSED_KEYS, n=1)
            advice = f'did you mean "{close[0]}"?' if close else "remove it"
            return f'"{key}" in {_file(run)} is not a key that DeepSpeed honours here; {advice}'
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
                f'"{".".join(path)}" ("auto") in {_file(run)} must have a value, as nothing here fills it in; '
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


def checkpoints_are_written_here(run: Run) -> str | None:
    for key, why in UNSAFE_CHECKPOINT_KEYS.items():
        if lookup(run.config.deepspeed_json, ("checkpoint", key)):
            return f'"checkpoint.{key}" in {_file(run)} cannot be honoured: {why}; remove it'
    return None


def _file(run: Run) -> str:
    return run.config.deepspeed.deepspeed_config or "the DeepSpeed JSON"


DEEPSPEED_RULES: tuple[Rule, ...] = (
    json_has_known_keys,
    json_agrees_with_flags,
    json_agrees_on_accumulation,
    json_leaves_nothing_automatic,
    offload_has_its_zero_stage,
    cpu_optimizer_agrees_with_json,
    checkpoints_are_written_here,
)
