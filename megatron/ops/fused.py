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

# The block sizes of a reduction determine the order of its sums, so none may be chosen by a benchmark.
UNTIMED = {"triton.autotune_pointwise": False, "dynamic_scale_rblock": False, "deterministic": True}

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """Compile `function` for calls whose first argument is a CUDA tensor. The function is its own reference.

    It must be pure, or write to its arguments in place; it is differentiable. It is compiled at its first call, and
    once more, for any length, when the length of its tensors first changes. Without Triton it runs eagerly.

    Where torch's algorithms have to be deterministic, it is compiled for every length on its own: a kernel for any
    length would depend on the lengths that came before, which a resumed run has not seen.
    """

    @functools.cache
    def compiled(deterministic: bool) -> Callable[..., Any]:
        if not importlib.util.find_spec("triton"):
            return function
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        if not deterministic:
            return torch.compile(function)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        known = torch._inductor.list_options()
        return torch.compile(
            function, dynamic=False, options={name: value for name, value in UNTIMED.items() if name in known}
        )

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not args[0].is_cuda:
            return function(*args)
        return compiled(torch.are_deterministic_algorithms_enabled())(*args)

    return cast(Function, run)
