"""Double precision that stays: transformers computes norms, softmax and routers in fp32 whatever comes in.

The casts of torch are replaced for the time of a comparison. A mode of torch (TorchFunctionMode) would not do: it is
off while autograd runs, and there the stream runs layers again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = ("float", "half", "bfloat16")
_TAKE_A_TYPE = (
    (Tensor, "to"), (Tensor, "type"), (Tensor, "sum"), (Tensor, "mean"), (Tensor, "cumsum"), (Tensor, "softmax"),
    (torch, "softmax"), (functional, "softmax"), (functional, "log_softmax"),
)  # fmt: skip
_PRODUCTS = ((Tensor, "__matmul__"), (Tensor, "matmul"), (torch, "matmul"), (torch, "bmm"))


@contextmanager
def float64_stays() -> Iterator[None]:
    """Let no cast turn a double precision tensor into a lower one. For one thread at a time.

    Products of mixed precision promote, as that of RoPE's frequencies and positions, which are cast from integers.
    """
    with ExitStack() as stack:
        for name in _CASTS:
            stack.enter_context(_replaced(Tensor, name, _uncast))
        for owner, name in _TAKE_A_TYPE:
            stack.enter_context(_replaced(owner, name, _with_float64))
        for owner, name in _PRODUCTS:
            stack.enter_context(_replaced(owner, name, _promoted))
        yield


@contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    original = getattr(owner, name)
    is_own = name in vars(owner)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _uncast(cast: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(cast)
    def call(x: Tensor, *positional: Any, **named: Any) -> Any:
        return x if x.dtype == torch.float64 else cast(x, *positional, **named)

    return call


def _with_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*positional: Any, **named: Any) -> Any:
        x = positional[0] if positional else named.get("input")
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            positional = tuple(_kept(each) for each in positional)
            named = {name: _kept(each) for name, each in named.items()}
        return function(*positional, **named)

    return call


def _promoted(product: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(product)
    def call(*factors: Tensor, **named: Any) -> Any:
        if any(factor.dtype == torch.float64 for factor in factors):
            factors = tuple(factor.double() for factor in factors)
        return product(*factors, **named)

    return call


def _kept(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _LOWER else argument
