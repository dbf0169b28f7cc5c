"""A run without a model: an engine that writes two small files, and the saves and loads of its only rank."""

import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron.arguments import parse_args
from megatron.checkpointing import Saver, choose_checkpoint, load_checkpoint
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config
from megatron.core.parallel_state import ParallelState
from megatron.initialize import Context
from megatron.weights.manifest import seal

PADDED_VOCAB_SIZE = 128
MODEL = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "8", "--seq-length", "128"]
STATE = TrainState(iteration=7, consumed_samples=28, consumed_tokens=3584, data_samples=28, seq_length=128)
CONTEXT = Context(ParallelState(), torch.device("cpu"), torch.float32, logging.getLogger("megatron"), 0)


class PretendEngine:
    """Writes two files and records what it is asked to load."""

    def __init__(self, error: Exception | None = None, on_nvme: bool = False) -> None:
        self.loads: list[tuple[Path, bool]] = []
        self.loads_by_deepspeed: list[tuple[Path, str]] = []
        self.states_are_on_nvme = on_nvme
        self._error = error

    def save(self, folder: Path, tag: str, with_frozen: bool = True) -> list[Path]:
        paths = [folder / tag / name for name in ("weights.pt", "moments.pt")]
        for path in paths:
            path.write_bytes(bytes(1000))
            if self._error is not None:
                raise self._error
        return paths

    def load_state(self, source: Path, with_optimizer: bool) -> None:
        self.loads.append((source, with_optimizer))

    def load_as_written(self, folder: Path, tag: str) -> None:
        self.loads_by_deepspeed.append((folder, tag))


def config(*flags: str) -> Config:
    return parse_args([*MODEL, "--lr", "1e-4", *flags])


def saver(folder: Path, *flags: str, error: Exception | None = None) -> Saver:
    engine: Any = PretendEngine(error)
    return Saver(engine, CONTEXT, config("--save", str(folder), *flags), PADDED_VOCAB_SIZE)


def save(folder: Path, state: TrainState = STATE, *flags: str) -> Path:
    return saver(folder, *flags).save(folder, state)


def load(path: Path, *flags: str, on_nvme: bool = False) -> tuple[TrainState, PretendEngine]:
    """Load what holds no tensors: the engine is given the path in place of what opening it gives."""
    engine: Any = PretendEngine(on_nvme=on_nvme)
    with patch("megatron.checkpointing.loading.open_verified", lambda path: path):
        return load_checkpoint(path, engine, CONTEXT, config("--load", str(path.parent), *flags)), engine


def choose(folder: Path, *flags: str) -> Path | None:
    return choose_checkpoint(config("--load", str(folder), *flags).checkpoint, CONTEXT)


def as_deepspeed(path: Path) -> Path:
    """Give a checkpoint a file by which DeepSpeed's are known, and a manifest that lists it."""
    (path / "weights.pt").rename(path / "mp_rank_00_model_states.pt")
    (path / "manifest.json").unlink()
    seal(path)
    return path


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
