"""One small layer, its inputs, and its results for tests of the streamed block."""

from dataclasses import replace

import pytest
import torch

from tests.unit.model.small_model import (
    OFFLOADED,
    ON_DEVICE,
    small_config,
    small_gpt_config,
    small_model,
)

LENGTH, BATCH, HIDDEN = 40, 2, 24
TIERS = pytest.mark.parametrize("execution", [ON_DEVICE, OFFLOADED], ids=["device", "host"])
CONFIGS = pytest.mark.parametrize("config_of", [small_config, small_gpt_config], ids=["llama", "gpt"])


def residual(dtype=torch.float64, seed=1):
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def on_tier(how, tensor):
    """The same numbers, stored on the store's tier."""
    resting = how.store.empty(tensor.shape, tensor.dtype)
    return resting.copy_(tensor)


def positions():
    return torch.arange(LENGTH).expand(BATCH, LENGTH)


def one_layer(execution, dtype=torch.float64, config_of=small_config, **changes):
    """(its way of being executed, the layer)"""
    model = small_model(config_of(LENGTH, num_layers=1, **changes), execution, dtype)
    return model.execution, model.layers[0]


def run_layer(execution, dy=None, dtype=torch.float64, slice_length=8192, config_of=small_config, **changes):
    """(y, {"x": dx, parameter: gradient})"""
    _, layer = one_layer(replace(execution, slice_length=slice_length), dtype, config_of, **changes)
    x = residual(dtype).requires_grad_()
    y = layer(x, positions())
    y.backward(residual(dtype, seed=2) if dy is None else dy)
    return y.detach().clone(), {"x": x.grad.clone(), **{name: p.grad for name, p in layer.named_parameters()}}
