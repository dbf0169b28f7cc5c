"""Rules for flags that have no effect with the other flags: such a flag is refused, or noted in the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron.config.config import Config
from megatron.config.model import ROPE_SCALING_PARAMETERS
from megatron.config.rules.common import Rule, Run, flag, given_flags, listed, shown

TOKENIZER_FILES = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "HFTokenizer": ("tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model", "tiktoken_pattern"),
    "NullTokenizer": ("vocab_size",),
}
TOKENIZER_SETTINGS = ("vocab_file", "merge_file", "tokenizer_model", "tiktoken_pattern", "vocab_size")


@dataclass(frozen=True)
class Effect:
    """Flags that have an effect only where `holds`; else "FLAG has no effect `reason`; `remedy`, or remove FLAG"."""

    names: tuple[str, ...]
    holds: Callable[[Config], bool]
    reason: str
    remedy: str


def _has_warmup(config: Config) -> bool:
    o = config.optimizer
    return bool(o.lr_warmup_iters or o.lr_warmup_samples or o.lr_warmup_tokens or o.lr_warmup_fraction)


def _offloads_block_inputs(config: Config) -> bool:
    if config.parallel.ds_sequence_parallel_fpdt:
        return config.parallel.ds_sequence_parallel_fpdt_offloading
    return config.deepspeed.deepspeed_activation_checkpointing


ADAPTER_SETTINGS = ("lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
DYNAMIC_LOSS_SCALE = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
EFFECTS = (
    Effect(
        (
            "ds_sequence_parallel_fpdt_chunk_size",
            "ds_sequence_parallel_fpdt_offloading",
            "ds_sequence_parallel_fpdt_checkpoint_interval",
            "ds_sequence_parallel_fpdt_recompute",
        ),
        lambda config: config.parallel.ds_sequence_parallel_fpdt,
        "without --ds-sequence-parallel-fpdt",
        "add --ds-sequence-parallel-fpdt",
    ),
    Effect(
        (
            "ds_sequence_parallel_fpdt_device_memory",
            "ds_sequence_parallel_fpdt_host_memory",
            "ds_sequence_parallel_fpdt_disk",
        ),
        lambda config: config.parallel.ds_sequence_parallel_fpdt_offloading,
        "without --ds-sequence-parallel-fpdt-offloading",
        "add --ds-sequence-parallel-fpdt-offloading",
    ),
    Effect(
        ("ds_sequence_parallel_fpdt_disk_memory",),
        lambda config: config.parallel.ds_sequence_parallel_fpdt_disk is not None,
        "without --ds-sequence-parallel-fpdt-disk",
        "name a folder with --ds-sequence-parallel-fpdt-disk",
    ),
    Effect(
        ("rotary_percent", "rotary_position_embeddings_theta", "rope_scaling_type"),
        lambda config: config.model.use_rotary_position_embeddings,
        "without --use-rotary-position-embeddings",
        "add --use-rotary-position-embeddings",
    ),
    Effect(
        ("add_qkv_bias",),
        lambda config: config.model.disable_bias_linear,
        "without --disable-bias-linear, which removes the biases of the other layers",
        "add --disable-bias-linear",
    ),
    Effect(
        ("openai_gelu",),
        lambda config: not config.model.swiglu,
        "with --swiglu, which replaces GELU",
        "remove --swiglu",
    ),
    Effect(
        ("checkpoint_in_cpu",),
        lambda config: config.parallel.ds_sequence_parallel_fpdt or _offloads_block_inputs(config),
        "without --deepspeed-activation-checkpointing",
        "add --deepspeed-activation-checkpointing",
    ),
    Effect(
        ("checkpoint_in_cpu",),
        _offloads_block_inputs,
        "with FPDT unless --ds-sequence-parallel-fpdt-offloading offloads the block inputs",
        "add --ds-sequence-parallel-fpdt-offloading",
    ),
    Effect(
        ("loss_scale", *DYNAMIC_LOSS_SCALE),
        lambda config: config.precision.fp16 or config.precision.bf16,
        "without --fp16",
        "add --fp16",
    ),
    Effect(
        DYNAMIC_LOSS_SCALE,
        lambda config: config.precision.loss_scale is None or config.precision.bf16,
        "with --loss-scale, which fixes the loss scale",
        "remove --loss-scale (from the DeepSpeed JSON, if it is there)",
    ),
    Effect(
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_tokens"),
        lambda config: config.optimizer.lr_decay_style == "WSD",
        "without --lr-decay-style WSD",
        "add --lr-decay-style WSD",
    ),
    Effect(
        ("min_lr",),
        lambda config: config.optimizer.lr_decay_style != "constant",
        "with --lr-decay-style constant",
        "choose another --lr-decay-style",
    ),
    Effect(
        ("lr_warmup_init",), _has_warmup, "without a warm-up", "add --lr-warmup-iters, -samples, -tokens or -fraction"
    ),
    Effect(
        ("eval_interval_mins",),
        lambda config: config.training.eval_iters > 0,
        "with --eval-iters 0",
        "evaluate with --eval-iters",
    ),
    Effect(
        ("keep_last_n_checkpoints", "save_interval_mins"),
        lambda config: config.checkpoint.save is not None,
        "without --save",
        "add --save",
    ),
    Effect(
        (
            *("finetune", "change_rope", "no_load_optim", "no_load_rng", "universal_checkpoint"),
            *(
                "ckpt_step",
                "load_tag",
                "exit_on_missing_checkpoint",
                "no_verify_checkpoint",
                "allow_unverified_checkpoint",
            ),
        ),
        lambda config: config.checkpoint.load is not None,
        "without --load",
        "add --load",
    ),
    Effect(
        ("valid_data_path", "test_data_path"),
        lambda config: bool(config.data.train_data_path),
        "without --train-data-path",
        "add --train-data-path",
    ),
    Effect(
        ("split",),
        lambda config: not config.data.train_data_path,
        "with --train-data-path, which is used whole",
        "give --data-path instead of --train-data-path",
    ),
    Effect(
        ("chat_template", "rewritten_answers"),
        lambda config: config.tokenizer.tokenizer_type == "HFTokenizer",
        "with a --tokenizer-type other than HFTokenizer, which reads no special tokens in text",
        "use --tokenizer-type HFTokenizer",
    ),
    Effect(
        ("wandb_exp_name", "wandb_save_dir"),
        lambda config: config.logging.wandb_project is not None,
        "without --wandb-project",
        "add --wandb-project",
    ),
    Effect(
        ("log_loss_by_position",),
        lambda config: config.training.eval_iters > 0,
        "with --eval-iters 0",
        "evaluate with --eval-iters",
    ),
    Effect(
        ("loss_position_buckets",),
        lambda config: config.logging.log_loss_by_position is not None,
        "without --log-loss-by-position",
        "add --log-loss-by-position equal",
    ),
    Effect(
        ("profile_steps", "profile_step_start", "profile_step_end", "profile_ranks", "profile_dir"),
        lambda config: config.logging.profile is not None,
        "without --profile",
        "add --profile",
    ),
    Effect(
        ("save_hf",),
        lambda config: config.model.hf_model is not None,
        "without --hf-model",
        "convert a checkpoint with tools/hf2megads_weight_converter.py to-hf",
    ),
    Effect(
        ("lora_rank", "load_adapter"),
        lambda config: config.model.hf_model is not None,
        "without --hf-model, whose weights are frozen for adapters",
        "give the folder of a Hugging Face model",
    ),
    Effect(
        (*ADAPTER_SETTINGS, "quantize_base"),
        lambda config: config.adapters.is_used,
        "without adapters",
        "add --lora-rank",
    ),
    Effect(
        ("lora_rank", *ADAPTER_SETTINGS),
        lambda config: config.adapters.load_adapter is None,
        "with --load-adapter, whose folder defines the adapters",
        "start new ones without --load-adapter",
    ),
    Effect(
        ("merge_adapter",),
        lambda config: config.adapters.is_used and config.checkpoint.save_hf is not None,
        "without adapters and --save-hf",
        "add --lora-rank and --save-hf",
    ),
    Effect(
        ("heartbeat_seconds",),
        lambda config: config.logging.progress != "off",
        "with --progress off",
        "remove --progress off",
    ),
)

# Flags that Megatron-DeepSpeed's scripts pass where they have no effect: noted in the log, with this reason.
NOTED = (
    Effect(
        ("loss_scale", *DYNAMIC_LOSS_SCALE),
        lambda config: not config.precision.bf16,
        "with --bf16, which needs no loss scale",
        "",
    ),
    Effect(
        ("save_interval",),
        lambda config: config.checkpoint.save is not None,
        "without --save: nothing will be saved",
        "",
    ),
)


def notes_of(config: Config) -> tuple[str, ...]:
    """Return a log line for each accepted flag that has no effect."""
    idle = ((effect, given_flags(config, effect.names)) for effect in NOTED if not effect.holds(config))
    return tuple(f"{shown(config, name)} has no effect {effect.reason}" for effect, names in idle for name in names)


def has_effect(effect: Effect, run: Run) -> str | None:
    """Check one row of `EFFECTS` against the flags that the user gave."""
    idle = given_flags(run.config, effect.names)
    if not idle or effect.holds(run.config):
        return None
    return f"{shown(run.config, idle[0])} has no effect {effect.reason}; {effect.remedy}, or remove {flag(idle[0])}"


def tokenizer_files_fit_its_type(run: Run) -> str | None:
    kind = run.config.tokenizer.tokenizer_type
    used = TOKENIZER_FILES[kind]
    idle = given_flags(run.config, [name for name in TOKENIZER_SETTINGS if name not in used])
    if not idle:
        return None
    return (
        f"{shown(run.config, idle[0])} has no effect with --tokenizer-type {kind}, which takes "
        f"{' and '.join(map(flag, used))}; remove {flag(idle[0])} or choose another --tokenizer-type"
    )


def rope_scaling_uses_its_parameters(run: Run) -> str | None:
    kind = run.config.model.rope_scaling_type
    known = dict.fromkeys(name for names in ROPE_SCALING_PARAMETERS.values() for name in names)
    idle = given_flags(run.config, [name for name in known if name not in ROPE_SCALING_PARAMETERS[kind]])
    if not idle:
        return None
    kinds = [kind for kind, names in ROPE_SCALING_PARAMETERS.items() if idle[0] in names]
    return (
        f"{shown(run.config, idle[0])} has no effect with --rope-scaling-type {kind}; use --rope-scaling-type "
        f"{listed(kinds)}, or remove {flag(idle[0])}"
    )


EFFECT_RULES: tuple[Rule, ...] = (
    *(partial(has_effect, effect) for effect in EFFECTS),
    tokenizer_files_fit_its_type,
    rope_scaling_uses_its_parameters,
)
