"""Which values a single setting may have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from megatron.config.config import Config
from megatron.config.rules.common import Rule, Run, flag, shown, value_of


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; an open end is not itself allowed. `example` is a value within."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    example: str = "1"

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low:g}"
        return low if self.high == math.inf else f"{low} and {'below' if self.high_open else 'at most'} {self.high:g}"


COUNT = Range(1)
COUNT_OR_NONE = Range(0, example="0")
POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0, example="0")
PROBABILITY = Range(0, 1, high_open=True, example="0")

RANGES = {
    "num_layers": COUNT,
    "hidden_size": COUNT,
    "ffn_hidden_size": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "kv_channels": COUNT,
    "seq_length": COUNT,
    "max_position_embeddings": COUNT,
    "rotary_percent": Range(0, 1, low_open=True),
    "rotary_position_embeddings_theta": Range(1, low_open=True, example="10000"),
    "rope_scaling_factor": Range(1, example="8"),
    "rope_scaling_original_max_position_embeddings": Range(1, example="8192"),
    "rope_scaling_low_freq_factor": POSITIVE,
    "rope_scaling_high_freq_factor": Range(0, low_open=True, example="4"),
    "rope_scaling_beta_fast": Range(0, low_open=True, example="32"),
    "rope_scaling_beta_slow": POSITIVE,
    "rope_scaling_attention_factor": POSITIVE,
    "rope_scaling_mscale": POSITIVE,
    "rope_scaling_mscale_all_dim": POSITIVE,
    "layernorm_epsilon": Range(0, low_open=True, example="1e-5"),
    "make_vocab_size_divisible_by": COUNT,
    "max_document_mb": Range(1, 2**20, example="256"),
    "prefetch_microbatches": COUNT_OR_NONE,
    "attention_dropout": PROBABILITY,
    "hidden_dropout": PROBABILITY,
    "init_method_std": Range(0, low_open=True, example="0.02"),
    "ds_sequence_parallel_size": COUNT,
    "ds_sequence_parallel_fpdt_chunk_size": Range(0, example="65536"),
    "ds_sequence_parallel_fpdt_checkpoint_interval": COUNT,
    "ds_sequence_parallel_fpdt_device_memory": NOT_NEGATIVE,
    "ds_sequence_parallel_fpdt_host_memory": Range(0, low_open=True, example="64"),
    "distributed_timeout_minutes": Range(1, example="30"),
    "zero_stage": Range(0, 3, example="0, 1, 2 or 3"),
    "loss_scale": POSITIVE,
    "initial_loss_scale": Range(1, example="65536"),
    "min_loss_scale": COUNT,
    "loss_scale_window": Range(1, example="1000"),
    "hysteresis": Range(1, example="2"),
    "lr": Range(0, low_open=True, example="1e-4"),
    "min_lr": NOT_NEGATIVE,
    "lr_decay_iters": COUNT,
    "lr_decay_samples": COUNT,
    "lr_decay_tokens": COUNT,
    "lr_warmup_iters": COUNT_OR_NONE,
    "lr_warmup_samples": COUNT_OR_NONE,
    "lr_warmup_tokens": COUNT_OR_NONE,
    "lr_warmup_fraction": Range(0, 1, example="0.01"),
    "lr_warmup_init": NOT_NEGATIVE,
    "lr_wsd_decay_iters": COUNT,
    "lr_wsd_decay_samples": COUNT,
    "lr_wsd_decay_tokens": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE,
    "adam_beta1": Range(0, 1, high_open=True, example="0.9"),
    "adam_beta2": Range(0, 1, high_open=True, example="0.999"),
    "adam_eps": Range(0, low_open=True, example="1e-8"),
    "micro_batch_size": COUNT,
    "global_batch_size": COUNT,
    "train_iters": COUNT,
    "train_samples": COUNT,
    "train_tokens": COUNT,
    "seed": COUNT_OR_NONE,
    "eval_iters": COUNT_OR_NONE,
    "eval_interval": COUNT,
    "exit_interval": COUNT,
    "exit_duration_in_mins": COUNT,
    "save_interval": COUNT,
    "keep_last_n_checkpoints": COUNT,
    "rollback_on_loss_spike": COUNT,
    "ckpt_step": COUNT,
    "vocab_size": COUNT,
    "log_interval": COUNT,
    "loss_position_buckets": COUNT,
    "profile_step_start": COUNT_OR_NONE,
    "profile_step_end": COUNT,
    "loss_spike_factor": Range(1, low_open=True, example="2"),
    "heartbeat_seconds": Range(0, low_open=True, example="60"),
    "peak_tflops": Range(0, low_open=True, example="989"),
}


def in_range(name: str, allowed: Range, run: Run) -> str | None:
    """Check one setting; one that is not set has nothing to check."""
    value = value_of(run.config, name)
    if value is None or allowed.holds(value):
        return None
    return (
        f"{shown(run.config, name)} must be {allowed}; use for example {flag(name)} "
        f"{_example(run.config, name, allowed)}"
    )


def _example(config: Config, name: str, allowed: Range) -> str:
    return str(config.model.seq_length) if name == "max_position_embeddings" else allowed.example


RANGE_RULES: tuple[Rule, ...] = tuple(partial(in_range, name, allowed) for name, allowed in RANGES.items())
