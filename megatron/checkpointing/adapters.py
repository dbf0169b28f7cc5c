"""Checkpoints of adapters: they hold no frozen weights, and name the model whose weights they need."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import nn

from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.files import read_json
from megatron.config import AdaptersConfig, Config
from megatron.config.rules.common import flag
from megatron.engine.engine import Engine
from megatron.weights.published_config import BASE_FILE
from megatron.weights.source import StateSource

# What the adapters in a checkpoint compute depends on.
_SETTINGS = ("lora_rank", "alpha", "lora_target_modules", "use_dora", "quantize_base")


def base_digest(config: Config) -> str:
    """Return the digest of the weights of --hf-model."""
    return _digest(Path(config.model.hf_model or ""))


@cache
def _digest(folder: Path) -> str:
    from megatron.hf.adapter_weights import digest_of_weights  # imports peft

    return digest_of_weights(folder)


def check_adapters(path: Path, saved: AdaptersConfig, config: Config) -> None:
    """Raise CheckpointError unless a run's adapters are those of a checkpoint, on the same model."""
    own = config.adapters
    if saved.is_used != own.is_used:
        with_, without = "adapters of a frozen model", "all weights of a model"
        kinds = (with_, without) if saved.is_used else (without, with_)
        remedy = "add the --lora flags" if saved.is_used else "remove them, or name the model with --hf-model"
        raise CheckpointError(
            f"the checkpoint {path} holds {kinds[0]}, and this run trains {kinds[1]}; {remedy}, or point --load "
            "elsewhere."
        )
    if not own.is_used:
        return
    for name in _SETTINGS:
        before, now = getattr(saved, name), getattr(own, name)
        if before != now:
            raise CheckpointError(
                f"the checkpoint {path} has adapters with {_shown(name, before)}, and this run has {_shown(name, now)};"
                " use the same, or point --load elsewhere."
            )
    if read_json(path / BASE_FILE)["digest"] != base_digest(config):
        raise CheckpointError(
            f"the adapters in {path} were trained on other weights than those of --hf-model ({config.model.hf_model}); "
            "name the folder of the model that they are for."
        )


def whole_source(engine: Engine, config: Config, checkpoint: StateSource | None) -> StateSource:
    """Return all weights of a run with adapters: the base's, and the adapters of a checkpoint or to begin with.

    WeightsError if the adapters are not those of the model.
    """
    from megatron.hf.weights import folder_source  # imports transformers

    return source_over(folder_source(Path(config.model.hf_model or "")), engine, config, checkpoint)


def source_over(base: StateSource, engine: Engine, config: Config, checkpoint: StateSource | None) -> StateSource:
    """Return all weights of a run with adapters on those of `base`; see `whole_source`."""
    # These import peft.
    from megatron.hf.adapter_weights import AdaptedSource, InitialAdapter, SavedAdapter
    from megatron.hf.model import HuggingFaceModel

    assert isinstance(engine.module, HuggingFaceModel), "adapters are those of --hf-model"
    model: nn.Module = engine.module.skeleton.model
    if config.adapters.quantize_base is not None:
        from megatron.hf.quantization import QuantizedSource

        base = QuantizedSource(model, base, next(model.parameters()).device)
    folder = config.adapters.load_adapter
    if checkpoint is not None:
        return AdaptedSource(model, base, checkpoint)
    if folder is not None:
        return AdaptedSource(model, base, SavedAdapter(model, Path(folder)))
    return AdaptedSource(model, base, InitialAdapter(model, base, config.training.seed))


def _shown(name: str, value: object) -> str:
    return f"{flag('lora_alpha' if name == 'alpha' else name)} {value}"
