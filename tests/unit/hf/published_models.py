"""Tiny models as transformers builds and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.unit.hf.tiny_models import config_of


def random_model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Build a model as transformers initializes it."""
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config_of(family, **settings), dtype=dtype))


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Build a model with random values in every parameter and buffer that is saved."""
    torch.manual_seed(1)
    model = random_model(family, **settings)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 8)
    nn.Module.to(model, dtype)
    return model


def published(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Save a tiny model into `folder`, and return it as transformers loads it."""
    tiny_model(family, dtype).save_pretrained(folder, **settings)
    return loaded(folder)


def loaded(folder: Path, **settings: Any) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, **settings))
