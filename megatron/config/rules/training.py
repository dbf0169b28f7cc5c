"""Rules for the lengths of training and of the learning-rate schedule, and for the data."""

from __future__ import annotations

from functools import partial

from megatron.config.rules.common import Rule, Run, flag, listed, shown, value_of
from megatron.config.sample_lengths import sample_lengths

UNITS = ("iters", "samples", "tokens")
LENGTH = tuple(f"train_{unit}" for unit in UNITS)
DECAY = tuple(f"lr_decay_{unit}" for unit in UNITS)
WARMUP = (*(f"lr_warmup_{unit}" for unit in UNITS), "lr_warmup_fraction")
WSD_DECAY = tuple(f"lr_wsd_decay_{unit}" for unit in UNITS)


def at_most_one(names: tuple[str, ...], what: str, run: Run) -> str | None:
    """Check that a length is set at most once; a length of 0 counts as not set."""
    given = [name for name in names if value_of(run.config, name)]
    if len(given) < 2:
        return None
    return f"{listed([shown(run.config, name) for name in given], 'and')} both set {what}; keep one of them"


def training_has_a_length(run: Run) -> str | None:
    if any(value_of(run.config, name) is not None for name in LENGTH):
        return None
    return (
        f"the length of the training is missing; add one of {listed(list(map(flag, LENGTH)))}, for example "
        "--train-iters 1000"
    )


def training_is_at_least_one_batch(run: Run) -> str | None:
    lengths = sample_lengths(run.config, run.world_size)
    length, batch = lengths.at(0), lengths.global_batch_size
    for name, least in (("train_samples", batch), ("train_tokens", batch * length)):
        given = value_of(run.config, name)
        if given is not None and given < least:
            return f"{shown(run.config, name)} must be at least one global batch, {least}; use {least} or more"
    return None


def wsd_has_a_decay_length(run: Run) -> str | None:
    if run.config.optimizer.lr_decay_style != "WSD" or any(value_of(run.config, name) for name in WSD_DECAY):
        return None
    return f"--lr-decay-style WSD needs the length of its final decay; add one of {listed(list(map(flag, WSD_DECAY)))}"


def learning_rates_stay_below_peak(run: Run) -> str | None:
    optimizer = run.config.optimizer
    for name in ("min_lr", "lr_warmup_init"):
        if value_of(run.config, name) > optimizer.lr:
            return (
                f"{shown(run.config, name)} must be at most {shown(run.config, 'lr')}; lower {flag(name)} or raise --lr"
            )
    return None


def loss_scale_starts_at_a_power_of_two(run: Run) -> str | None:
    scale = run.config.precision.initial_loss_scale
    if scale == int(scale) and int(scale).bit_count() == 1:
        return None
    below = 2 ** (int(scale).bit_length() - 1)
    return f"--initial-loss-scale ({scale:g}) must be a power of two; use {below} or {2 * below}"


def there_is_data(run: Run) -> str | None:
    data = run.config.data
    if data.data_path and data.train_data_path:
        return (
            f"{shown(run.config, 'data_path')} and {shown(run.config, 'train_data_path')} both set the training data; "
            "keep --data-path to split one dataset, or --train-data-path, --valid-data-path and --test-data-path to "
            "give one each"
        )
    if data.data_path or data.train_data_path:
        return None
    return (
        "no dataset is given; add --data-path PREFIX, for the files PREFIX.bin and PREFIX.idx that "
        "tools/preprocess_data.py writes"
    )


def profile_has_iterations_ranks_and_a_folder(run: Run) -> str | None:
    logging = run.config.logging
    if logging.profile is None:
        return None
    if logging.profile_step_end <= logging.profile_step_start:
        return (
            f"{shown(run.config, 'profile_step_end')} must be above {shown(run.config, 'profile_step_start')}, after "
            f"which profiling starts; use --profile-step-end {logging.profile_step_start + 2}"
        )
    if not all(0 <= rank < run.world_size for rank in logging.profile_ranks):
        return (
            f"{shown(run.config, 'profile_ranks')} must be ranks of this run, 0 to {run.world_size - 1}; use for "
            "example --profile-ranks 0"
        )
    if not (logging.profile_dir or logging.tensorboard_dir):
        return "--profile has no folder to write to; add --profile-dir or --tensorboard-dir"
    return None


def a_missing_checkpoint_can_be_an_error(run: Run) -> str | None:
    checkpoint = run.config.checkpoint
    if not checkpoint.exit_on_missing_checkpoint or checkpoint.load != checkpoint.save:
        return None
    return (
        f"--exit-on-missing-checkpoint cannot be honored where {shown(run.config, 'load')} is --save, as a run starts "
        "there; remove it, or save to another folder"
    )


def rollback_has_checkpoints_and_spikes(run: Run) -> str | None:
    config = run.config
    if config.checkpoint.rollback_on_loss_spike is None:
        return None
    needed = ("save", "save_interval", "loss_spike_factor")
    missing = [flag(name) for name in needed if value_of(config, name) is None]
    rollback = shown(config, "rollback_on_loss_spike")
    if missing:
        return f"{rollback} needs {listed(list(map(flag, needed)), 'and')}; add {listed(missing, 'and')}"
    if config.training.no_check_for_nan_in_loss_and_grad:
        return f"{rollback} needs the check that --no-check-for-nan-in-loss-and-grad turns off; remove one of them"
    return None


TRAINING_RULES: tuple[Rule, ...] = (
    training_has_a_length,
    training_is_at_least_one_batch,
    partial(at_most_one, DECAY, "the end of the learning-rate decay"),
    partial(at_most_one, WARMUP, "the length of the warm-up"),
    partial(at_most_one, WSD_DECAY, "the length of the final decay"),
    wsd_has_a_decay_length,
    learning_rates_stay_below_peak,
    loss_scale_starts_at_a_power_of_two,
    there_is_data,
    profile_has_iterations_ranks_and_a_folder,
    a_missing_checkpoint_can_be_an_error,
    rollback_has_checkpoints_and_spikes,
)
