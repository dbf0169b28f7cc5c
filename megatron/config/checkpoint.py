"""What is saved and loaded."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = None
    """Folder to write checkpoints to."""

    load: str | None = None
    """What to resume from: a folder of checkpoints, one of them (global_stepN), or a folder of safetensors. It must be
    there, unless it is --save: then the first start is a new run."""

    save_interval: int | None = None
    """Iterations between checkpoints. Default: at the end only."""

    keep_last_n_checkpoints: int | None = None
    """How many checkpoints to keep; older ones are deleted once a new one is complete. Default: all."""

    rollback_on_loss_spike: int | None = None
    """Go back to the newest checkpoint in --save, at most so many times in all, from a loss that --loss-spike-factor
    calls a spike or that is not finite, and go on without the data read since that checkpoint."""

    ckpt_step: int | None = None
    """Iteration of the checkpoint to load. Default: the newest that is whole."""

    load_tag: str | None = None
    """Checkpoint to load, global_stepN: Megatron-DeepSpeed's spelling of --ckpt-step N."""

    exit_on_missing_checkpoint: bool = False
    """A --load without a checkpoint is an error in any case; refused where --load is --save, as a run starts there."""

    no_verify_checkpoint: bool = False
    """Compare only the sizes of a checkpoint's files with its manifest before loading it, not their hashes."""

    allow_unverified_checkpoint: bool = False
    """Load a checkpoint that has no manifest, so that nobody can tell whether its files are whole."""

    finetune: bool = False
    """Load the weights alone: no optimizer, no random state, iteration 0."""

    change_rope: bool = False
    """Load a checkpoint whose RoPE has another theta or scaling, to train it on with the one given."""

    no_load_optim: bool = False
    """Do not load the optimizer states."""

    no_load_rng: bool = False
    """Do not load the random state."""

    universal_checkpoint: bool = False
    """Load a checkpoint whatever ranks, ZeRO stage and number format wrote it: a universal one, or one as it was
    saved."""
