"""Linear layer, and the tape on which a streamed layer's matrix products run.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum of dy

A weight may also be stored transposed, [I, O], as in GPT-2.

Inside `LinearTape.running`, every call of `linear` is a numbered product of the tape: products are counted from 0 in
the order of their calls. The tape can record the output of a product, replay a recorded one instead of computing it,
skip one whose value nobody reads, and sum the gradient of a weight in fp32 over many runs of the same layer. The
gradient of a frozen weight is not computed, nor is the product's input saved for it. A frozen weight may be quantized:
each product dequantizes it, forward and backward, and drops the result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from megatron.ops.gradient_sum import GradientSum, GradientSums

_running: ContextVar[LinearTape | None] = ContextVar("linear_tape", default=None)


class QuantizedWeight(Protocol):
    """A frozen weight in a narrow number format."""

    shape: Size

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a new tensor."""


class LinearTape:
    """The products of one run of a layer.

    Args:
        recorded: numbers of the products whose outputs `take_outputs` returns.
        replayed: outputs of an earlier run by number; they are not recomputed, and released on use.
        skipped: numbers of the products whose value nobody reads: the output has the right shape and arbitrary values,
            and passes gradients on.
        sums: accumulates the gradients of weights in fp32; autograd then sees none of them.
    """

    def __init__(
        self,
        recorded: Collection[int] = (),
        replayed: Mapping[int, Tensor] | None = None,
        skipped: Collection[int] = (),
        sums: GradientSums | None = None,
    ) -> None:
        self.num_products = 0
        self._recorded, self._skipped, self._sums = recorded, skipped, sums
        self._replayed = dict(replayed or {})
        self._outputs: list[Tensor] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Number the calls of `linear` in this context (of the thread or greenlet)."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    def take_outputs(self) -> list[Tensor]:
        """Return the outputs of the recorded products since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def product(
        self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, transposed: bool = False
    ) -> Tensor:
        """Compute, replay or skip the next product."""
        number, self.num_products = self.num_products, self.num_products + 1
        replayed, is_skipped = self._replayed.pop(number, None), number in self._skipped
        if not isinstance(weight, Tensor):
            y = _QuantizedLinear.apply(x, weight, bias, transposed, replayed, is_skipped)
        elif self._sums is not None and torch.is_grad_enabled():
            weight_sum = self._sums.of(weight)
            if weight_sum is None and weight.requires_grad:
                raise RuntimeError("a linear layer's weight is none of the parameters whose gradients are summed")
            weight_OI = weight.detach().T if transposed else weight.detach()
            y = _SummedLinear.apply(x, weight_OI, bias, weight_sum, transposed, replayed, is_skipped)
        else:
            y = _output(x, weight.T if transposed else weight, bias, replayed, is_skipped)
        if number in self._recorded:
            self._outputs.append(y)
        return y


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """Compute x [..., I] times weight [O, I], or [I, O] if `transposed`, plus bias [O]: [..., O].

    The bias of a quantized weight is frozen, too.
    """
    tape = _running.get()
    if tape is not None:
        return tape.product(x, weight, bias, transposed)
    if isinstance(weight, Tensor):
        return F.linear(x, weight.T if transposed else weight, bias)
    y: Tensor = _QuantizedLinear.apply(x, weight, bias, transposed, None, False)
    return y


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_sum: GradientSum | None,
        transposed: bool,
        replayed: Tensor | None,
        is_skipped: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, *[x] * (weight_sum is not None))
        ctx.weight_sum, ctx.transposed = weight_sum, transposed
        return _output(x, weight, bias, replayed, is_skipped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        weight, *saved_x = ctx.saved_tensors
        dy_TO = dy.flatten(0, -2)
        for x in saved_x:
            factors = dy_TO, x.flatten(0, -2)
            ctx.weight_sum.add_product(*(factors[::-1] if ctx.transposed else factors))
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, dy_TO.sum(0) if ctx.needs_input_grad[2] else None, None, None, None, None


class _QuantizedLinear(torch.autograd.Function):
    """A product that holds no dequantized weight for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        transposed: bool,
        replayed: Tensor | None,
        is_skipped: bool,
    ) -> Tensor:
        # Not the tensor of the weight: ZeRO-3 releases it in between, and gathers it again.
        ctx.weight, ctx.transposed = weight, transposed
        if replayed is not None:
            return replayed
        if is_skipped:
            return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))
        dense = weight.dequantized(x.dtype)
        return F.linear(x, dense.T if transposed else dense, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        dense = ctx.weight.dequantized(grads[0].dtype)
        return grads[0] @ (dense.T if ctx.transposed else dense), None, None, None, None, None


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, replayed: Tensor | None, is_skipped: bool) -> Tensor:
    if replayed is not None:
        return replayed
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if is_skipped else F.linear(x, weight, bias)
