"""A small model in real DeepSpeed engines, trained, saved, loaded, and gathered whole.

DeepSpeed keeps process groups for the life of a process, so each call needs ranks of its own (a fresh RankPool), in
which many engines live one after another.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatron.config import OptimizerConfig
from megatron.engine.engine import Engine, whole_parameters
from megatron.optimizer.param_groups import parameter_groups
from megatron.weights.opening import open_state
from megatron.weights.source import MOMENTS, WEIGHTS

TAG = "global_step2"
FROZEN, TIED = "frozen.weight", "head.weight"
State = dict[str, dict[str, Tensor]]  # by name and part


@dataclass(frozen=True)
class Layout:
    """How an engine keeps its states."""

    num_ranks: int
    zero_stage: int
    bf16: bool = False
    step_group: int | None = None
    """Elements of a rank after which ZeRO-3 steps the next by themselves. By default it is a billion."""
    switch: str | None = None
    """A switch of ZeRO 1 and 2 that changes what the files look like."""

    def __str__(self) -> str:
        groups = f"-by{self.step_group}" if self.step_group else ""
        switch = f"-{self.switch}" if self.switch else ""
        return f"{self.num_ranks}ranks-zero{self.zero_stage}-{'bf16' if self.bf16 else 'fp32'}{groups}{switch}"


@dataclass(frozen=True)
class Trained:
    """What a rank saw: the state when it saved or loaded, and the losses of the next two steps."""

    state: State
    module: dict[str, Tensor]
    losses: list[float]


class Model(nn.Module):
    """Tied, frozen, decayed and undecayed parameters of sizes that no number of ranks divides."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 7)
        self.frozen = nn.Linear(7, 7, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.body = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.body(self.frozen(self.embedding(tokens[:-1]))))
        return functional.cross_entropy(self.head(x).float(), tokens[1:], reduction="sum")


def build(layout: Layout, seed: int, stated: Mapping[str, Any] | None = None) -> Engine:
    """Return an engine over every rank of this process's world; `stated` stands for a user's DeepSpeed JSON."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    stated = stated or {}
    zero = {"stage": layout.zero_stage, **stated.get("zero_optimization", {})}
    if layout.step_group is not None:
        zero["sub_group_size"] = layout.step_group
    if layout.switch is not None:
        zero[layout.switch] = True
    settings = {
        "train_batch_size": layout.num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        **stated,
        "zero_optimization": zero,
        "bf16": {**stated.get("bf16", {}), "enabled": layout.bf16},
    }
    groups, config = (lambda model: parameter_groups(model, 0.1)), OptimizerConfig(lr=1e-2)
    return Engine(
        lambda: Model(seed).to(dtype),
        [nn.LayerNorm],
        groups,
        config,
        settings,
        torch.device("cpu"),
    )


def steps(engine: Engine, first: int, count: int) -> list[float]:
    """Train; each rank has tokens of its own, which depend on the step alone. Return the mean losses of all ranks."""
    losses = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(0, 11, (9,), generator=generator)
        loss = engine.train_step([[tokens]], torch.tensor(8.0 * dist.get_world_size()), 1e-2)
        dist.all_reduce(loss)
        losses.append(float(loss))
    return losses


def gather(engine: Engine) -> State:
    """Return the live fp32 weights and moments whole, by DeepSpeed's own means. Collective over all ranks."""
    state: State = {}
    if engine.zero_stage in (1, 2):
        optimizer = engine._engine.optimizer
        _link_by_offset(optimizer)
        # DeepSpeed links parameters to moments once, after the first group's first step, when the others have none.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with whole_parameters([parameter]):
                state[name] = {WEIGHTS: parameter.detach().clone()}
        elif engine.zero_stage == 0:
            adam = engine._engine.optimizer.state[parameter]
            state[name] = {WEIGHTS: parameter.detach(), **{moment: adam[moment] for moment in MOMENTS if adam}}
        else:
            state[name] = {WEIGHTS: deepspeed.utils.safe_get_full_fp32_param(parameter)}
            for moment in MOMENTS:
                state[name][moment] = deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)
    return {name: {part: tensor.clone() for part, tensor in parts.items()} for name, parts in state.items()}


def _link_by_offset(optimizer: Any) -> None:
    """Link parameters to their fp32 weights where they are stored.

    DeepSpeed (0.19.8) links them as if their order were the model's, unless there is padding between them.
    """
    paddings = optimizer.round_robin_bit16_padding
    optimizer.round_robin_bit16_padding = [[1] for _ in paddings]
    optimizer._link_all_hp_params()
    optimizer.round_robin_bit16_padding = paddings


def module_weights(engine: Engine) -> dict[str, Tensor]:
    """Return the weights that the model computes with, whole. Collective over all ranks."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with whole_parameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def train_and_save(layouts: list[Layout], folder: Path) -> list[Trained]:
    """Two steps, a checkpoint in FOLDER/LAYOUT, two more steps; for each layout."""
    results = []
    for layout in layouts:
        engine = build(layout, seed=1)
        steps(engine, 0, 2)
        state, module = gather(engine), module_weights(engine)
        engine.save(folder / str(layout), TAG)
        results.append(Trained(state, module, steps(engine, 2, 2)))
    return results


def load(jobs: list[tuple[Path, Layout, bool]]) -> list[Trained]:
    """For each (checkpoint, layout, whether with moments): load into a model of other weights, then two steps."""
    results = []
    for path, layout, with_moments in jobs:
        engine = build(layout, seed=2)
        engine.load_state(open_state(path), with_moments)
        state, module = gather(engine) if with_moments else {}, module_weights(engine)
        results.append(Trained(state, module, steps(engine, 2, 2)))
    return results


def errors(jobs: list[tuple[Path, Layout]]) -> list[str]:
    """Return the message of the error that loading each checkpoint raises."""
    messages = []
    for path, layout in jobs:
        try:
            build(layout, seed=2).load_state(open_state(path), True)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages
