"""Rules for runs whose steps differ in length."""

from __future__ import annotations

from megatron.config.errors import ConfigError
from megatron.config.rules.common import Rule, Run, flag, listed, shown, value_of
from megatron.config.sample_lengths import parse_schedule

LENGTHS_IN_TOKENS = ("train_tokens", "lr_decay_tokens", "lr_warmup_tokens", "lr_wsd_decay_tokens")


def schedule_is_one(run: Run) -> str | None:
    text, size = run.config.training.seq_length_schedule, run.config.parallel.ds_sequence_parallel_size
    if text is None:
        return None
    try:
        lengths = [length for length, _ in parse_schedule(text)]
    except ConfigError as error:
        return str(error)
    schedule = shown(run.config, "seq_length_schedule")
    uneven = [length for length in lengths if length % size or not length]
    if uneven:
        return (
            f"{schedule}: {uneven[0]} must be a multiple of {shown(run.config, 'ds_sequence_parallel_size')} above 0, "
            f"as each rank takes equally many tokens; use {max(uneven[0] // size, 1) * size}"
        )
    if max(lengths) != run.config.model.seq_length:
        return (
            f"the longest length of {schedule} must be {shown(run.config, 'seq_length')}, for which memory is planned "
            f"and at which the run is evaluated; use --seq-length {max(lengths)}, or change the schedule"
        )
    return None


def grouped_steps_are_not_counted_in_tokens(run: Run) -> str | None:
    if not run.config.finetuning.group_by_length:
        return None
    given = [name for name in LENGTHS_IN_TOKENS if value_of(run.config, name)]
    if not given:
        return None
    others = [name.replace("tokens", unit) for name in given for unit in ("iters", "samples")]
    return (
        f"{listed([shown(run.config, name) for name in given], 'and')} cannot be planned with --group-by-length, where "
        f"the tokens of a step depend on the conversations; use {listed(list(map(flag, others)))}"
    )


LENGTH_RULES: tuple[Rule, ...] = (schedule_is_one, grouped_steps_are_not_counted_in_tokens)
