"""The random number generator (RNG) state of a rank, in a file."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron.checkpointing.errors import CheckpointError
from megatron.core.atomic_file import flush_to_disk
from megatron.initialize import Context
from megatron.weights.torch_files import why_unreadable


def random_state_path(checkpoint: Path, context: Context) -> Path:
    """Return the path of a rank's RNG state."""
    return checkpoint / f"random_{context.parallel_state.rank}.pt"


def write_random_state(path: Path, context: Context) -> None:
    """Write the RNG state of this rank; the file is on the disk when this returns."""
    state = {"cpu": torch.get_rng_state()}
    if context.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(context.device)
    with path.open("wb") as file:
        torch.save(state, file)
    flush_to_disk(path)


def restore_random_state(path: Path, context: Context, uses_dropout: bool) -> None:
    """Restore the RNG state; CheckpointError if the file is damaged.

    A rank that the saving run did not have keeps the state from its seed, and warns if the run `uses_dropout`.
    """
    if not path.is_file():
        if uses_dropout:
            context.log.warning("%s is not there: this rank's dropout starts from its seed", path)
        return
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged file fails in many ways, all of them inside torch
        raise CheckpointError(
            f"{path} cannot be read ({why_unreadable(error)}); name another checkpoint with --ckpt-step, or point "
            "--load elsewhere."
        ) from error
    torch.set_rng_state(state["cpu"])
    if context.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], context.device)
