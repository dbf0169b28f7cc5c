"""Memory traffic of a token's experts besides their products, counted like the kernels of megatron.hf.experts.

Of one pair of a token and an expert, h hidden and f first outputs, b 1 with biases and 0 without, in elements read and
written:

    copy to the experts            2 h           backward    3 h    gathered, and summed over a token's experts
    bias of the first product      4 f b                       f b  the gradient of the bias is a product of few rows
    activation                     counted on the meta device, as the model's code runs it, forward and backward
    bias of the last product       4 h b                       h b
    back to the tokens             2 h                       2 h
    weights, and sum over experts  3 h                       5 h    the gradients of the pair and of its weight

The forward pass runs twice, since experts are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def expert_traffic(experts: Any, hidden_size: int, num_chosen: int) -> int:
    """Return the elements that the kernels of a token's experts read and write: two forward passes and a backward pass.

    `experts` is a module that transformers' `use_experts_implementation` decorates, on the meta device.
    """
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    outputs = first.shape[2 if experts.is_transposed else 1]
    activation_forward, activation_backward = _traffic_of_activation(experts, outputs)
    biases = outputs + hidden_size if experts.has_bias else 0
    forward = 7 * hidden_size + 4 * biases + activation_forward
    backward = 10 * hidden_size + biases + activation_backward
    return num_chosen * (2 * forward + backward)


def _traffic_of_activation(experts: Any, outputs: int) -> tuple[int, int]:
    """Return the elements that the activation of one pair reads and writes, forward and backward."""
    x = torch.empty(1, outputs, device="meta", requires_grad=True)
    with _Traffic() as forward:
        y = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    dy = torch.empty_like(y)
    with _Traffic() as backward:
        torch.autograd.grad(y, x, dy)
    return forward.elements, backward.elements


class _Traffic(TorchDispatchMode):
    """Counts the elements of what each kernel reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
            self.elements += sum(tensor.numel() for tensor in tensors)
        return result
