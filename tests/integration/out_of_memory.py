"""`pretrain_gpt.py` on a GPU that is full: the second step fails as torch does there."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from megatron.engine.engine import Engine
from pretrain_gpt import leave, main

train_step = Engine.train_step


def fail_after_a_step(engine: Engine, *arguments: Any) -> None:
    """Take one step, say what the engine counts, and fail."""
    train_step(engine, *arguments)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    sys.stdout.write(f"parameters: {parameters}\n")
    for (what, device), num_bytes in engine.held_bytes().items():
        sys.stdout.write(f"held {what} on {device}: {num_bytes}\n")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


if __name__ == "__main__":
    Engine.train_step = fail_after_a_step  # type: ignore[method-assign, assignment]
    leave(main(sys.argv[1:]))
