"""Adapters on tiny transformers models in DeepSpeed engines, trained, saved and resumed; and by peft in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.engine.engine import Engine
from megatron.hf.adapter_weights import AdaptedSource, InitialAdapter
from megatron.hf.adapters import add_adapters, is_of_adapter
from megatron.hf.weights import folder_source
from megatron.optimizer.param_groups import parameter_groups
from megatron.weights.opening import open_state
from tests.distributed.transformers_case import (
    LEARNING_RATE,
    NUM_STEPS,
    OPTIMIZER,
    TAG,
    WEIGHT_DECAY,
    Case,
    Trained,
    batch_of,
    build,
    finished,
    steps,
)
from tests.unit.hf.families import eager_loss

SEED = 3


@dataclass(frozen=True)
class Outcome:
    """A training, the bytes of its rank's model states, and the names in its checkpoint."""

    trained: Trained
    num_bytes: dict[tuple[str, str], int]
    saved: list[str]


def initial(model: Any, base: Path) -> AdaptedSource:
    source = folder_source(base)
    return AdaptedSource(model, source, InitialAdapter(model, source, SEED))


def train(cases: list[Case], bases: Path, folder: Path) -> list[Outcome]:
    """Train each case on the model in BASES/FAMILY; half-way, save a checkpoint in FOLDER/CASE."""
    outcomes = []
    for case in cases:
        engine, state = build(case)
        engine.load_state(initial(engine.module.skeleton.model, bases / case.family), with_optimizer=False)
        first = steps(case, engine, state, range(NUM_STEPS // 2))
        engine.save(folder / str(case), TAG, with_frozen=False)
        num_bytes = engine.held_bytes()
        second = steps(case, engine, state, range(NUM_STEPS // 2, NUM_STEPS))
        result = finished(case, engine, state, *(a + b for a, b in zip(first, second, strict=True)))
        outcomes.append(Outcome(result, num_bytes, list(open_state(folder / str(case) / TAG).names)))
    return outcomes


def resume(cases: list[tuple[Path, Case]], bases: Path) -> list[Trained]:
    """Train each case from a checkpoint that another may have saved half-way."""
    return [resumed(path, case, bases, *build(case)) for path, case in cases]


def resumed(path: Path, case: Case, bases: Path, engine: Engine, state: Any) -> Trained:
    source = AdaptedSource(engine.module, folder_source(bases / case.family), open_state(path / TAG))
    engine.load_state(source, with_optimizer=True)
    return finished(case, engine, state, *steps(case, engine, state, range(NUM_STEPS // 2, NUM_STEPS)))


def peft_alone(case: Case, base: Path) -> Trained:
    """Train in one process, everything whole, by transformers, peft and torch."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    assert case.adapters is not None
    add_adapters(model, case.adapters)
    source = initial(model, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.get(name))
    model.train()
    groups = parameter_groups(model, WEIGHT_DECAY)
    adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), eps=1e-3)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batch = batch_of(step, case.num_samples)
        loss = eager_loss(model, *batch) / batch[2].sum()
        adam.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        adam.step()
    batch = batch_of(NUM_STEPS, case.num_samples)
    with torch.no_grad():
        evaluated = float(eager_loss(model.eval(), *batch) / batch[2].sum())
    return Trained(losses, norms, evaluated, {name: p.detach() for name, p in model.named_parameters()})


def sizes(weights: dict[str, Tensor]) -> tuple[int, int]:
    """Return the numbers of trained and of frozen weights."""
    trained = sum(tensor.numel() for name, tensor in weights.items() if is_of_adapter(name))
    return trained, sum(tensor.numel() for tensor in weights.values()) - trained
