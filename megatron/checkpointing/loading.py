"""Loading: what the flags leave to be read of a checkpoint that has been verified."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpointing.errors import CheckpointError, first_line
from megatron.checkpointing.files import read_json
from megatron.checkpointing.random_state import random_state_path, restore_random_state
from megatron.config import Config
from megatron.engine.engine import Engine
from megatron.initialize import Context
from megatron.train_state import TrainState


def load_checkpoint(path: Path, engine: Engine, context: Context, config: Config) -> TrainState:
    """Read what --finetune, --no-load-optim and --no-load-rng leave to be read. Collective over all ranks.

    DeepSpeed unpickles its files: `choose_checkpoint` must have verified them.
    """
    settings = config.checkpoint
    try:
        engine.load(path.parent, path.name, with_optimizer=not (settings.finetune or settings.no_load_optim))
        if settings.finetune:
            return TrainState()
        if not settings.no_load_rng:
            restore_random_state(random_state_path(path, context), context)
        return TrainState(**read_json(path / "train_state.json"))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file shows itself in many ways, all of them inside DeepSpeed and torch
        raise CheckpointError(
            f"the checkpoint {path} cannot be loaded: {first_line(error)}; "
            "name another one with --ckpt-step, or point --load elsewhere."
        ) from error
