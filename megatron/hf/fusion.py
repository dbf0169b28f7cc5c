"""Fused forms of modules that transformers computes operation by operation: RMSNorm, and MLPs gated by SiLU.

A module is replaced only if it computes the fused formula: it runs on a few numbers, its weights replaced by others,
before and after a change of mode, and both results are compared. Its parameters, and the modules in it, stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from megatron.ops.swiglu import gated_silu

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_WIDTH, _INNER = 4, 6


def fuse_modules(model: nn.Module) -> None:
    """Let the modules of a model that have a fused form compute it."""
    equal: dict[tuple[Any, ...], bool] = {}  # by class and settings: the modules of all layers are alike
    for module in model.modules():
        if len(inspect.signature(type(module).forward).parameters) != 2:  # itself, and what it takes
            continue
        if _is_norm(module):
            _replace(module, _rms_norm, {"weight": (_WIDTH,)}, equal)
        elif _is_gated_mlp(module):
            shapes = {
                f"{name}.{part}": _shape(name, part)
                for name in _PROJECTIONS
                for part, _ in module.get_submodule(name).named_parameters(recurse=False)
            }
            _replace(module, _gated_mlp, shapes, equal)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, _epsilon(module))


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(gated_silu(module.gate_proj(x), module.up_proj(x)))
    return y


def _is_norm(module: nn.Module) -> bool:
    """Whether it may be an RMSNorm: it has a vector of weights, and nothing else."""
    parameters = dict(module.named_parameters())
    is_alone = parameters.keys() == {"weight"} and not list(module.children()) and not list(module.buffers())
    # ZeRO-3 may have partitioned the weight.
    return is_alone and _epsilon(module) is not None and len(_whole_shape(parameters["weight"])) == 1


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether it may be a gated MLP: it has the three linear layers, perhaps an activation, and nothing else."""
    children = dict(module.named_children())
    linear = [children.pop(name, None) for name in _PROJECTIONS]
    others = [*module.parameters(recurse=False), *(p for child in children.values() for p in child.parameters())]
    return children.keys() <= {"act_fn"} and not others and all(type(each) is nn.Linear for each in linear)


def _replace(
    module: nn.Module, formula: Callable[[Any, Tensor], Tensor], shapes: Mapping[str, Any], equal: dict[Any, bool]
) -> None:
    activation = getattr(module, "act_fn", None)
    key = (type(module), formula, *shapes, _epsilon(module), repr(activation))
    if key not in equal:
        equal[key] = _computes(module, formula, shapes)
    if equal[key]:
        module.forward = partial(formula, module)


@torch.no_grad()
def _computes(module: nn.Module, formula: Callable[[Any, Tensor], Tensor], shapes: Mapping[str, Any]) -> bool:
    """Whether a module computes a formula, in training and in evaluation."""
    weights = {name: _numbers(*shape) for name, shape in shapes.items()}
    inputs = [scale * _numbers(1, 5, _WIDTH) for scale in (1e-3, 1.0, 100.0)]
    forward, mode = module.forward, module.training
    try:
        for training in (True, False):
            module.train(training)
            theirs = [functional_call(module, weights, x) for x in inputs]
            module.forward = partial(formula, module)
            ours = [functional_call(module, weights, x) for x in inputs]
            module.forward = forward
            if not all(torch.allclose(a, b, rtol=1e-5, atol=0) for a, b in zip(ours, theirs, strict=True)):
                return False
    except Exception:  # whatever else it computes, it is not the formula
        return False
    finally:
        module.__dict__.pop("forward", None)
        module.train(mode)
    return True


def _numbers(*shape: int) -> Tensor:
    """Return numbers of both signs, in fp64 on the CPU also where ZeRO-3 changes what torch.randn returns."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, device="cpu").double().mul(shape[-1] + 0.7).sin().view(shape)


def _shape(name: str, part: str) -> tuple[int, ...]:
    rows, columns = (_WIDTH, _INNER) if name == "down_proj" else (_INNER, _WIDTH)
    return (rows, columns) if part == "weight" else (rows,)


def _epsilon(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _whole_shape(parameter: Any) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
