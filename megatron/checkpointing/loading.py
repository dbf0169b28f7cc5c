"""Loading of a verified checkpoint: weights, optimizer states, counters and RNG state, as the flags ask."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpointing.adapters import whole_source
from megatron.checkpointing.agreement import on_first_rank
from megatron.checkpointing.compatibility import loads_any_layout, other_bits
from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.files import read_json
from megatron.checkpointing.random_state import random_state_path, restore_random_state
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, sample_lengths
from megatron.engine.engine import Engine
from megatron.initialize import Context
from megatron.weights.errors import WeightsError, first_line
from megatron.weights.opening import is_portable, open_verified


def saved_state(path: Path, config: Config) -> TrainState:
    """Return the counters that loading the checkpoint gives; reads no tensor."""
    if config.checkpoint.finetune or is_portable(path):
        return TrainState()
    try:
        return TrainState(**read_json(path / "train_state.json"))
    except TypeError as error:
        raise CheckpointError(
            f"the counters in {path / 'train_state.json'} are not those of this version ({first_line(error)}); use the "
            "version that wrote them, or --finetune to load the weights alone."
        ) from error


def starting_state(path: Path | None, config: Config, context: Context) -> TrainState:
    """Return the counters to resume from, at this run's batch and length; rank 0 reads. Collective over all ranks.

    Warns of a batch or length that differs from the checkpoint `path`, and of settings that change a deterministic run.
    """
    state, differences = TrainState(), list[str]()
    if path is not None:
        state, differences = on_first_rank(lambda: (saved_state(path, config), other_bits(path, config)))
    lengths = sample_lengths(config, context.parallel_state.world_size)
    for difference in [*differences, *state.start(lengths)]:
        context.log.warning("%s", difference)
    return state


def load_checkpoint(path: Path, engine: Engine, context: Context, config: Config) -> TrainState:
    """Load all that --finetune, --no-load-optim and --no-load-rng do not exclude. Collective over all ranks.

    Each rank reads its own part of the files in `path`. DeepSpeed itself reads the optimizer states on NVMe.
    `choose_checkpoint` must have verified the files: they are not hashed again.
    """
    settings = config.checkpoint
    weights_alone = settings.finetune or is_portable(path)
    with_optimizer = not (weights_alone or settings.no_load_optim)
    try:
        if with_optimizer and engine.states_are_on_nvme and not loads_any_layout(path, config):
            engine.load_as_written(path.parent, path.name)
        else:
            saved = open_verified(path)
            source = whole_source(engine, config, saved) if config.adapters.is_used else saved
            engine.load_state(source, with_optimizer)
        if not (weights_alone or settings.no_load_rng):
            dropout = config.model.attention_dropout, config.model.hidden_dropout, config.adapters.lora_dropout
            restore_random_state(random_state_path(path, context), context, any(dropout))
        return saved_state(path, config)
    except (CheckpointError, WeightsError):
        raise
    except Exception as error:  # a damaged file fails in many ways, all of them inside DeepSpeed and torch
        raise CheckpointError(
            f"the checkpoint {path} cannot be loaded: {first_line(error)}; "
            "name another one with --ckpt-step, or point --load elsewhere."
        ) from error
