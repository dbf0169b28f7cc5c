"""Initial values of parameters: drawn in fp32 from one generator, in the order of construction, then cast.

So a model starts from the same values for any dtype, ZeRO stage and execution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megatron.config.model import ModelConfig

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Initialization:
    """The format and the place of a model's parameters, and the seed of their values."""

    dtype: torch.dtype
    device: torch.device = CPU
    seed: int = 1234

    def initializer(self, config: ModelConfig) -> Initializer:
        """Return an initializer for the parameters of a model, from the first on."""
        return Initializer(
            generator=torch.Generator(self.device).manual_seed(self.seed),
            dtype=self.dtype,
            device=self.device,
            std=config.init_method_std,
            residual_std=config.init_method_std / (2 * config.num_layers) ** 0.5,
        )


@dataclass(frozen=True)
class Initializer:
    """Creates parameters of one dtype on one device: normal with `std`, or `residual_std` into the residual stream."""

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device
    std: float
    residual_std: float

    def normal(self, *shape: int, into_residual: bool = False) -> nn.Parameter:
        """Create a parameter of normally distributed values."""
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        drawn = torch.empty_like(values, dtype=torch.float32)
        drawn.normal_(std=self.residual_std if into_residual else self.std, generator=self.generator)
        return nn.Parameter(values.copy_(drawn))

    def zeros(self, *shape: int) -> nn.Parameter:
        """Create a parameter of zeros."""
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.device))
