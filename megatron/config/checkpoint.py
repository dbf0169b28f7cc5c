"""Settings for saving, loading and resuming from checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = None
    """Folder to write checkpoints to."""

    save_hf: str | None = None
    """New folder to write at the end of training, which transformers' from_pretrained loads: the weights of --hf-model
    in the number format of training, its config.json and its tokenizer. A run that stops before its end writes none."""

    load: str | None = None
    """Checkpoint to resume from: a folder of checkpoints, one checkpoint (global_stepN), or a folder of safetensors. It
    must exist, unless it is the folder of --save: then the first start is a new run."""

    save_interval: int | None = None
    """Iterations between checkpoints. Default: at the end only."""

    save_interval_mins: float | None = None
    """Minutes between checkpoints, which follow the step in which the time is up; with --save-interval whichever comes
    first."""

    keep_last_n_checkpoints: int | None = None
    """How many checkpoints to keep; older ones are deleted once a new one is complete. Default: all."""

    rollback_on_loss_spike: int | None = None
    """Roll back to the newest checkpoint in --save when the loss is not finite or exceeds --loss-spike-factor, at most
    this many times in all; training continues without the data read since that checkpoint."""

    ckpt_step: int | None = None
    """Iteration of the checkpoint to load. Default: the newest complete one."""

    load_tag: str | None = None
    """Checkpoint to load, global_stepN: Megatron-DeepSpeed's spelling of --ckpt-step N."""

    exit_on_missing_checkpoint: bool = False
    """Accepted: a --load without a checkpoint is always an error. Refused where --load is --save, because a new run
    starts there."""

    no_verify_checkpoint: bool = False
    """Verify only the sizes of a checkpoint's files against its manifest before loading, not their hashes."""

    allow_unverified_checkpoint: bool = False
    """Load a checkpoint that has no manifest, so that its files cannot be verified."""

    finetune: bool = False
    """Load only the weights: no optimizer states, no random state; training starts at iteration 0."""

    change_rope: bool = False
    """Load a checkpoint whose RoPE has another theta or scaling, and continue training with the RoPE of the flags."""

    no_load_optim: bool = False
    """Do not load the optimizer states."""

    no_load_rng: bool = False
    """Do not load the random state."""

    universal_checkpoint: bool = False
    """Load a checkpoint written with any number of ranks, ZeRO stage and number format: a universal checkpoint, or one
    as it was saved."""
