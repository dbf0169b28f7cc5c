"""`pretrain_gpt.py` with NaN in one place: POISON="ITERATION RANK WHAT", where WHAT is of layer 2.

queries     those of token 50, in the forward pass
gradient    that of the queries of token 50, in the backward pass
weights     the norm of the MLP, before the step begins
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

import megatron.launch.program
from megatron.engine.engine import Engine
from megatron.model.layers import SelfAttention
from pretrain_gpt import leave, main

TOKEN = 50
train_step, project = Engine.train_step, SelfAttention.project


class _PoisonedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.nan


class Poison:
    """Puts NaN where it was told to."""

    def __init__(self, iteration: int, rank: int, what: str) -> None:
        self.iteration, self.what = iteration, what
        self.is_here = rank == int(os.environ["RANK"])
        self.step = 0
        self.attention: Any = None  # layer 2's

    def train_step(self, engine: Engine, *arguments: Any) -> Tensor:
        self.step += 1
        self.attention = engine.module.get_submodule("layers.1.self_attention")
        if self.is_due("weights"):
            parameter: Any = engine.module.get_parameter("layers.1.post_attention_layernorm.weight")
            for weights in (parameter.data, getattr(parameter, "ds_tensor", parameter.data)):
                weights.fill_(torch.nan)
        return train_step(engine, *arguments)

    def project(self, attention: SelfAttention, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, kv = project(attention, x, positions)
        if attention is self.attention and bool((positions == TOKEN).any()):
            if self.is_due("queries"):
                q = q * torch.nan
            if self.is_due("gradient"):
                q = _PoisonedGradient.apply(q)
        return q, kv

    def is_due(self, what: str) -> bool:
        return self.is_here and (self.step, self.what) == (self.iteration, what)


if __name__ == "__main__":
    iteration, rank, what = os.environ["POISON"].split()
    poison = Poison(int(iteration), int(rank), what)
    Engine.train_step = lambda *arguments: poison.train_step(*arguments)  # type: ignore[method-assign, assignment]
    SelfAttention.project = lambda *arguments: poison.project(*arguments)  # type: ignore[method-assign, assignment]
    megatron.launch.program.SECONDS_FOR_OTHERS = 1.0  # no launcher waits
    leave(main(sys.argv[1:]))
