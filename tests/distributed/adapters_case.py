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
from megatron.hf.inspection import decoder_layers
from megatron.hf.nf4 import NF4Weight, dequantize, quantize
from megatron.hf.quantization import QuantizedSource, weights_to_quantize
from megatron.hf.weights import folder_source
from megatron.weights.opening import open_state
from megatron.weights.source import StateSource
from tests.distributed.transformers_case import (
    NUM_STEPS,
    TAG,
    Case,
    Trained,
    build,
    finished,
    steps,
    train_alone,
)

SEED = 3


@dataclass(frozen=True)
class Outcome:
    """A training, the bytes of its rank's model states, and the names in its checkpoint."""

    trained: Trained
    num_bytes: dict[tuple[str, str], int]
    saved: list[str]


def source_of(model: Any, base: Path) -> StateSource:
    source = folder_source(base)
    narrow = any(isinstance(module, NF4Weight) for module in model.modules())
    return QuantizedSource(model, source, torch.device("cpu")) if narrow else source


def initial(model: Any, base: Path) -> AdaptedSource:
    source = source_of(model, base)
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


def train_and_resume(
    cases: list[Case], others: list[tuple[Path, Case]], bases: Path, folder: Path
) -> tuple[list[Outcome], list[Trained]]:
    """Train each case, and resume the others from checkpoints of these."""
    return train(cases, bases, folder), resume(others, bases)


def resumed(path: Path, case: Case, bases: Path, engine: Engine, state: Any) -> Trained:
    model: Any = engine.module
    source = AdaptedSource(model, source_of(model.skeleton.model, bases / case.family), open_state(path / TAG))
    engine.load_state(source, with_optimizer=True)
    return finished(case, engine, state, *steps(case, engine, state, range(NUM_STEPS // 2, NUM_STEPS)))


def peft_alone(case: Case, base: Path) -> Trained:
    """Train in one process, everything whole, by transformers, peft and torch; on what NF4 has left of the weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    assert case.adapters is not None
    add_adapters(model, case.adapters)
    source = initial(model, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.get(name))
        for module, name in weights_to_quantize(decoder_layers(model)) if case.adapters.quantize_base else ():
            weight = module.get_parameter(name)
            weight.copy_(dequantize(quantize(weight), weight.shape, weight.dtype))
    return train_alone(case, model)


def sizes(weights: dict[str, Tensor]) -> tuple[int, int]:
    """Return the number of trained weights, and the bytes of the frozen ones."""
    trained = sum(tensor.numel() for name, tensor in weights.items() if is_of_adapter(name))
    frozen = [tensor for name, tensor in weights.items() if not is_of_adapter(name)]
    return trained, sum(tensor.numel() * min(tensor.itemsize, 2) for tensor in frozen)
