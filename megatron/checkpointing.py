"""Checkpoints: global_stepN with DeepSpeed's files and ours, and `latest`, which names a checkpoint once it is whole.

global_stepN/*.pt               weights and optimizer states, DeepSpeed's
global_stepN/random_RANK.pt     random state of a rank
global_stepN/config.json        the configuration that wrote it
global_stepN/train_state.json   counters
latest                          "global_stepN"
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.config import Config, architecture_fields, describe_difference, with_rope_of, zero_stage_run
from megatron.engine.engine import Engine
from megatron.initialize import Context
from megatron.train_state import TrainState

_LATEST = "latest"


class CheckpointError(Exception):
    """A checkpoint cannot be read or written, or is not of this model."""


def find_checkpoint(folder: str | None) -> Path | None:
    """The newest whole checkpoint in a folder; None where there is none yet. CheckpointError where `latest` lies."""
    if folder is None or not (Path(folder) / _LATEST).is_file():
        return None
    tag = (Path(folder) / _LATEST).read_text().strip()
    path = Path(folder) / tag
    if not (path / "train_state.json").is_file():
        raise CheckpointError(
            f"{folder}/{_LATEST} names the checkpoint {tag!r}, which is not there or not whole; "
            f"write the name of a whole checkpoint into {folder}/{_LATEST}, or point --load elsewhere."
        )
    return path


@dataclass(frozen=True)
class Layout:
    """What DeepSpeed's files depend on besides the architecture."""

    num_ranks: int
    zero_stage: int
    number_format: str
    padded_vocab_size: int

    @classmethod
    def of(cls, config: Config, num_ranks: int, padded_vocab_size: int) -> Layout:
        """The layout that a run writes and can read."""
        precision = config.precision
        number_format = "--bf16" if precision.bf16 else "--fp16" if precision.fp16 else "fp32"
        return cls(num_ranks, zero_stage_run(config), number_format, padded_vocab_size)

    @property
    def partitioning(self) -> str:
        """What optimizer states depend on, and weights too at stage 3."""
        return f"{self.num_ranks} ranks, --zero-stage {self.zero_stage}, {self.number_format}"


def check_checkpoint(path: Path, config: Config, num_ranks: int, padded_vocab_size: int) -> None:
    """Raise CheckpointError unless this run can load the checkpoint. Reads no tensor."""
    saved, model = Config.from_dict(_read_json(path / "config.json")).model, config.model
    with_own_rope = with_rope_of(model, saved)
    if config.checkpoint.change_rope:
        saved = with_own_rope
    difference = describe_difference(architecture_fields(saved), architecture_fields(model))
    if difference:
        only_rope = architecture_fields(with_own_rope) == architecture_fields(model)
        change = "add --change-rope to train it on with this one, " if only_rope else ""
        raise CheckpointError(
            f"the checkpoint {path} is of another model: {difference}; {change}pass the flags it was trained with "
            f"(they are in {path / 'config.json'}), or point --load elsewhere."
        )
    written, own = Layout(**_read_json(path / "layout.json")), Layout.of(config, num_ranks, padded_vocab_size)
    if written.padded_vocab_size != own.padded_vocab_size:
        raise CheckpointError(
            f"the checkpoint {path} has {written.padded_vocab_size} rows in its embedding, and the tokenizer and "
            f"--make-vocab-size-divisible-by ask for {own.padded_vocab_size}; use the tokenizer it was trained with."
        )
    weights_alone = config.checkpoint.finetune or config.checkpoint.no_load_optim
    is_partitioned = not weights_alone or 3 in (written.zero_stage, own.zero_stage)
    if is_partitioned and written.partitioning != own.partitioning:
        raise CheckpointError(
            f"the checkpoint {path} was written with {written.partitioning}, and this run has {own.partitioning}; "
            "start it as it was written, or below ZeRO stage 3 take the weights alone (--finetune)."
        )


def save_checkpoint(
    engine: Engine, context: Context, config: Config, state: TrainState, padded_vocab_size: int
) -> Path:
    """Write a checkpoint and make it the latest. Collective over all ranks."""
    folder = Path(config.checkpoint.save or "")
    tag = f"global_step{state.iteration}"
    path = folder / tag
    engine.save(folder, tag)
    path.mkdir(parents=True, exist_ok=True)  # on the other nodes, where they do not share the folder
    torch.save(_random_state(context), path / f"random_{context.parallel_state.rank}.pt")
    if context.is_first_rank:
        _write_json(path / "config.json", config.to_dict())
        layout = Layout.of(config, context.parallel_state.world_size, padded_vocab_size)
        _write_json(path / "layout.json", asdict(layout))
        _write_json(path / "train_state.json", state.to_dict())
    dist.barrier()
    if context.is_first_rank:
        _replace(folder / _LATEST, tag)
    dist.barrier()
    return path


def load_checkpoint(path: Path, engine: Engine, context: Context, config: Config) -> TrainState:
    """Read what --finetune, --no-load-optim and --no-load-rng leave to be read. Collective over all ranks."""
    settings = config.checkpoint
    try:
        engine.load(path.parent, path.name, with_optimizer=not (settings.finetune or settings.no_load_optim))
    except Exception as error:  # a damaged file shows itself in many ways, all of them inside DeepSpeed and torch
        raise CheckpointError(
            f"the checkpoint {path} cannot be loaded: {_unreadable_files(path) or _first_line(error)}; "
            f"name another checkpoint in {path.parent / _LATEST}, or point --load elsewhere."
        ) from error
    if settings.finetune:
        return TrainState()
    if not settings.no_load_rng:
        _restore_random_state(path / f"random_{context.parallel_state.rank}.pt", context)
    return TrainState(**_read_json(path / "train_state.json"))


def _unreadable_files(path: Path) -> str:
    """Which of the checkpoint's tensor files are not whole zip archives; empty if all are."""
    damaged = [file.name for file in sorted(path.glob("*.pt")) if not zipfile.is_zipfile(file)]
    return f"{', '.join(damaged)} is damaged" if damaged else ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _random_state(context: Context) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if context.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(context.device)
    return state


def _restore_random_state(path: Path, context: Context) -> None:
    """A rank that the saving run did not have keeps the state it was seeded with."""
    if not path.is_file():
        context.log.warning("%s is not there: this rank's dropout starts from its seed", path)
        return
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["cpu"])
    if context.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], context.device)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); point --load at a whole checkpoint.") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _replace(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
