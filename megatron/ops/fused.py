"""Fusion of token-wise arithmetic: on CUDA a function becomes a few kernels, elsewhere it runs as written."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

# A function is compiled anew for each number format, gradient mode and layout. Beyond the limit, which is 8 else, torch
# runs what is new as written, whose roundings differ: the same call would not give the same bits in every process.
RECOMPILE_LIMIT = 64

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """Compile `function` where its first argument is a CUDA tensor. The function is its own reference.

    It must be pure, or write to its arguments in place; gradients pass through it. Compiled at its first call, and
    once more, for any length, when the length of its tensors first changes. Without Triton it runs as written.
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
