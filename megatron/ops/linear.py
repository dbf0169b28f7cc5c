"""Linear layer of which a caller may want the gradients alone.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum of dy

A caller that sums a weight's gradient over many calls hangs a `GradientSum` on the weight, as its attribute
`gradient_sum`: the products are then added to it in fp32 as they are made, and autograd sees no gradient of the weight.
A caller that runs the same calls twice, first for their values and then for their gradients, hangs a list on the
weight, as its attribute `outputs`: the first run appends its outputs, and the second takes them from the front.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.gradient_sum import GradientSum


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, output_needed: bool = True) -> Tensor:
    """x [..., I] times weight [O, I], plus bias [O].

    With output_needed=False, where the weight has a `gradient_sum`, the result has the right shape and no meaning: it
    costs nothing and passes gradients on.
    """
    gradient_sum = getattr(weight, "gradient_sum", None)
    outputs: list[Tensor] | None = getattr(weight, "outputs", None)
    if gradient_sum is not None and torch.is_grad_enabled():
        return _SummedLinear.apply(x, weight.detach(), bias, gradient_sum, output_needed, outputs)
    y = F.linear(x, weight, bias)
    if outputs is not None:
        outputs.append(y)
    return y


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_sum: GradientSum,
        output_needed: bool,
        outputs: list[Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient_sum = gradient_sum
        if outputs:
            return outputs.pop(0)
        if output_needed:
            return F.linear(x, weight, bias)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dy_TO = dy.flatten(0, -2)
        ctx.gradient_sum.add_product(dy_TO, x.flatten(0, -2))
        return dy @ weight, None, dy_TO.sum(0) if ctx.needs_input_grad[2] else None, None, None, None
