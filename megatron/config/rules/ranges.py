"""Rules for single values: the range of each setting."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from megatron.config.config import Config
from megatron.config.rules.common import Rule, Run, flag, shown, value_of


@dataclass(frozen=True)
class Range:
    """A range from `low` to `high`, without an end that is open. `example` is a value within.

    `ceiling` is a limit of the program, not of the setting: larger numbers overflow the types that it computes with.
    """

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    example: str = "1"
    ceiling: float = math.inf

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and value <= self.ceiling and math.isfinite(value)

    def wanted(self, value: float) -> str:
        """Return the condition that `value` violates."""
        if self.ceiling < value < math.inf:
            return f"at most {self.ceiling}"
        return str(self)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low:g}"
        return low if self.high == math.inf else f"{low} and {'below' if self.high_open else 'at most'} {self.high:g}"


# Token ids and offsets of a dataset are int32. No product of a few of these counts overflows an int64.
INT32 = 2**31 - 1
COUNT = Range(1, ceiling=INT32)
COUNT_OR_NONE = Range(0, example="0", ceiling=INT32)
WIDTH = Range(1, ceiling=2**24)
SAMPLES = Range(1, ceiling=2**40)
TOKENS = Range(1, ceiling=2**60)
SMALL_COUNT = Range(1, ceiling=2**16)
GIB = Range(0, low_open=True, example="64", ceiling=2**30)
SCALE = Range(1, example="65536", ceiling=2**127)
POSITIVE = Range(0, low_open=True)
MINUTES = Range(0, low_open=True, example="60")
NOT_NEGATIVE = Range(0, example="0")
PROBABILITY = Range(0, 1, high_open=True, example="0")

RANGES = {
    "num_layers": SMALL_COUNT,
    "hidden_size": WIDTH,
    "ffn_hidden_size": Range(1, ceiling=2**26),
    "num_attention_heads": WIDTH,
    "num_key_value_heads": WIDTH,
    "kv_channels": WIDTH,
    "seq_length": COUNT,
    "max_position_embeddings": COUNT,
    "rotary_percent": Range(0, 1, low_open=True),
    "rotary_position_embeddings_theta": Range(1, low_open=True, example="10000"),
    "rope_scaling_factor": Range(1, example="8"),
    "rope_scaling_original_max_position_embeddings": Range(1, example="8192", ceiling=INT32),
    "rope_scaling_low_freq_factor": POSITIVE,
    "rope_scaling_high_freq_factor": Range(0, low_open=True, example="4"),
    "rope_scaling_beta_fast": Range(0, low_open=True, example="32"),
    "rope_scaling_beta_slow": POSITIVE,
    "rope_scaling_attention_factor": POSITIVE,
    "rope_scaling_mscale": POSITIVE,
    "rope_scaling_mscale_all_dim": POSITIVE,
    "layernorm_epsilon": Range(0, low_open=True, example="1e-5"),
    "make_vocab_size_divisible_by": WIDTH,
    "max_document_mb": Range(1, example="256", ceiling=2**20),
    "prefetch_microbatches": replace(SMALL_COUNT, low=0),
    "lora_rank": SMALL_COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": PROBABILITY,
    "attention_dropout": PROBABILITY,
    "hidden_dropout": PROBABILITY,
    "init_method_std": Range(0, low_open=True, example="0.02"),
    "ds_sequence_parallel_size": COUNT,
    "local_rank": COUNT_OR_NONE,
    "ds_sequence_parallel_fpdt_chunk_size": Range(0, example="65536", ceiling=INT32),
    "ds_sequence_parallel_fpdt_checkpoint_interval": SMALL_COUNT,
    "ds_sequence_parallel_fpdt_device_memory": replace(GIB, low_open=False, example="0"),
    "ds_sequence_parallel_fpdt_host_memory": GIB,
    "ds_sequence_parallel_fpdt_disk_memory": GIB,
    "distributed_timeout_minutes": Range(0.05, 1e6, example="30"),
    "zero_stage": Range(0, 3, example="0, 1, 2 or 3"),
    "loss_scale": replace(SCALE, low=0, low_open=True),
    "initial_loss_scale": SCALE,
    "min_loss_scale": COUNT,
    "loss_scale_window": Range(1, example="1000", ceiling=INT32),
    "hysteresis": Range(1, example="2", ceiling=INT32),
    "lr": Range(0, low_open=True, example="1e-4"),
    "min_lr": NOT_NEGATIVE,
    "lr_decay_iters": COUNT,
    "lr_decay_samples": SAMPLES,
    "lr_decay_tokens": TOKENS,
    "lr_warmup_iters": COUNT_OR_NONE,
    "lr_warmup_samples": replace(SAMPLES, low=0, example="0"),
    "lr_warmup_tokens": replace(TOKENS, low=0, example="0"),
    "lr_warmup_fraction": Range(0, 1, example="0.01"),
    "lr_warmup_init": NOT_NEGATIVE,
    "lr_wsd_decay_iters": COUNT,
    "lr_wsd_decay_samples": SAMPLES,
    "lr_wsd_decay_tokens": TOKENS,
    "weight_decay": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE,
    "adam_beta1": Range(0, 1, high_open=True, example="0.9"),
    "adam_beta2": Range(0, 1, high_open=True, example="0.999"),
    "adam_eps": Range(0, low_open=True, example="1e-8"),
    "micro_batch_size": SMALL_COUNT,
    "global_batch_size": COUNT,
    "train_iters": COUNT,
    "train_samples": SAMPLES,
    "train_tokens": TOKENS,
    "seed": Range(0, example="1234", ceiling=2**63 - 1),
    "eval_iters": COUNT_OR_NONE,
    "eval_interval": COUNT,
    "eval_interval_mins": MINUTES,
    "exit_interval": COUNT,
    "exit_duration_in_mins": COUNT,
    "save_interval": COUNT,
    "save_interval_mins": MINUTES,
    "keep_last_n_checkpoints": COUNT,
    "rollback_on_loss_spike": COUNT,
    "ckpt_step": COUNT,
    "vocab_size": COUNT,
    "log_interval": COUNT,
    "loss_position_buckets": SMALL_COUNT,
    "profile_step_start": COUNT_OR_NONE,
    "profile_step_end": COUNT,
    "loss_spike_factor": Range(1, low_open=True, example="2"),
    "heartbeat_seconds": Range(0, low_open=True, example="60", ceiling=10**7),
    "peak_tflops": Range(0, low_open=True, example="989"),
}


def in_range(name: str, allowed: Range, run: Run) -> str | None:
    """Check one setting; None is always allowed."""
    value = value_of(run.config, name)
    if value is None or allowed.holds(value):
        return None
    return (
        f"{shown(run.config, name)} must be {allowed.wanted(value)}; use for example {flag(name)} "
        f"{_example(run.config, name, allowed)}"
    )


def _example(config: Config, name: str, allowed: Range) -> str:
    return str(config.model.seq_length) if name == "max_position_embeddings" else allowed.example


RANGE_RULES: tuple[Rule, ...] = tuple(partial(in_range, name, allowed) for name, allowed in RANGES.items())
