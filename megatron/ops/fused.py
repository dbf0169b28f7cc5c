"""Fusion of token-wise operations by torch.compile: a few kernels on CUDA, eager execution elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

# torch recompiles a function for each dtype, gradient mode and layout. Beyond the limit, by default 8, it runs further
# variants eagerly, with different rounding: the same call would not give the same bits in every process.
RECOMPILE_LIMIT = 64

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """Compile `function` for calls whose first argument is a CUDA tensor. The function is its own reference.

    It must be pure, or write to its arguments in place; it is differentiable. It is compiled at its first call, and
    once more, for any length, when the length of its tensors first changes. Without Triton it runs eagerly.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        if not importlib.util.find_spec("triton"):
            return function
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        return torch.compile(function)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return (compiled() if args[0].is_cuda else function)(*args)

    return cast(Function, run)
