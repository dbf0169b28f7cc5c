"""Experts of transformers' models: each product of all experts is one kernel.

    T tokens, k experts of each, E experts in all, P = T k pairs of a token and an expert, h hidden size

    sort the pairs by expert      [T, h] -> [P, h]
    gate and up, then down        [P, h] -> [P, h], the rows of an expert times its matrix
    back to the tokens' order     [P, h] -> [T, k, h], weighted, and summed over k

The sort is a permutation of pairs, so its backward pass is one too, and adds nothing up atomically. No token is
dropped, and with torch's grouped products nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megatron.ops.linear import QuantizedWeight

IMPLEMENTATION = "fpdt"
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNED_ROWS = 8
_HOPPER = 9  # compute capability of the first GPUs on which torch's grouped product is one kernel


def use_grouped_experts(model: Any) -> None:
    """Let a model's experts run by `run_experts`, where they can be chosen; others run by their own code."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(IMPLEMENTATION)


def describe_experts(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Return how a model's experts run, for the log; "" without experts that transformers lets choose."""
    if not any(hasattr(module, "is_concatenated") for module in model.modules()):
        return ""
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] >= _HOPPER:
        return "torch's grouped products, one kernel for all experts"
    return f"one product per expert ({dtype} on {device.type}); grouped products need bf16 and a Hopper GPU"


def run_experts(experts: Any, x_Th: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Run each token's experts, and return their weighted sum [T, h].

    `experts` is a module that transformers' `use_experts_implementation` decorates. Its stacks of weights are
    [E, outputs, inputs], or [E, inputs, outputs] if it `is_transposed`.
    """
    num_chosen = chosen_Tk.shape[1]
    expert_P, order_P = chosen_Tk.flatten().sort(stable=True)
    place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    ends_E = count(expert_P, experts.num_experts).cumsum(0, dtype=torch.int32)
    h_Ph = _ToExperts.apply(x_Th, order_P, place_P, num_chosen)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    h_Pf = _product(experts, first, h_Ph, ends_E, expert_P)
    h_Pf = experts._apply_gate(h_Pf) if experts.has_gate else experts.act_fn(h_Pf)
    y_Ph = _product(experts, "down_proj", h_Pf, ends_E, expert_P)
    if getattr(experts, "has_post_expert_norm", False):  # new in transformers 5.24
        y_Ph = experts.post_expert_norm(y_Ph)
    y_Tkh = _ToTokens.apply(y_Ph, order_P, place_P).unflatten(0, (-1, num_chosen))
    return (y_Tkh * weights_Tk[..., None]).sum(1).to(x_Th.dtype)


def count(ids: Tensor, num_ids: int) -> Tensor:
    """Count how often each of the ids 0 to num_ids - 1 occurs, without waiting for the device."""
    values = ids.int() if ids.is_cuda else ids.to(torch.float32)  # torch's histogram takes no other type there
    return torch.histc(values, bins=num_ids, min=0, max=num_ids - 1)


def _product(experts: Any, name: str, x_PI: Tensor, ends_E: Tensor, expert_P: Tensor) -> Tensor:
    """Multiply the rows of each expert by its matrix of a stack, and add its bias."""
    weight = getattr(experts, name)
    x_PI = x_PI.to(weight.dtype)
    if isinstance(weight, Tensor):
        y_PO = _grouped(x_PI, weight if experts.is_transposed else weight.transpose(1, 2), ends_E)
    else:
        y_PO = _QuantizedProduct.apply(x_PI, weight, ends_E, experts.is_transposed)
    return _WithBias.apply(y_PO, getattr(experts, f"{name}_bias"), ends_E, expert_P) if experts.has_bias else y_PO


def _grouped(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert, which end at `ends_E`, by its matrix."""
    if x_PI.dtype in _GROUPED_DTYPES:
        return F.grouped_mm(x_PI, weight_EIO, offs=ends_E)
    y_PO: Tensor = torch.ops.transformers.grouped_mm_fallback(x_PI, weight_EIO, ends_E)
    return y_PO


class _QuantizedProduct(torch.autograd.Function):
    """The product with a frozen quantized stack, which holds no dequantized one for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight: QuantizedWeight, ends_E: Tensor, is_transposed: bool) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.weight, ctx.is_transposed = weight, is_transposed
        dense = weight.dequantized(x_PI.dtype)
        return _grouped(x_PI, dense if is_transposed else dense.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_PO, (ends_E,) = grads[0].contiguous(), ctx.saved_tensors
        dense = ctx.weight.dequantized(dy_PO.dtype)
        return _grouped(dy_PO, dense.transpose(1, 2) if ctx.is_transposed else dense, ends_E), None, None, None


class _WithBias(torch.autograd.Function):
    """The rows of each expert plus its bias, whose gradient is not summed in half precision."""

    @staticmethod
    def forward(ctx: Any, y_PO: Tensor, bias_EO: Tensor, ends_E: Tensor, expert_P: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E, expert_P)
        return y_PO + bias_EO[expert_P]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ends_E, expert_P = ctx.saved_tensors
        dy_PO = grads[0].contiguous()
        if not ctx.needs_input_grad[1]:
            return dy_PO, None, None, None
        if dy_PO.dtype in _GROUPED_DTYPES:  # as a product, of as many rows as its kernel needs
            ones_KP = dy_PO.new_ones(len(dy_PO), _ALIGNED_ROWS).T
            return dy_PO, F.grouped_mm(ones_KP, dy_PO, offs=ends_E)[:, 0], None, None
        return dy_PO, dy_PO.new_zeros(len(ends_E), dy_PO.shape[1]).index_add_(0, expert_P, dy_PO), None, None


class _ToExperts(torch.autograd.Function):
    """Copies of the tokens in the order of their experts."""

    @staticmethod
    def forward(ctx: Any, x_Th: Tensor, order_P: Tensor, place_P: Tensor, num_chosen: int) -> Tensor:
        ctx.save_for_backward(place_P)
        ctx.num_chosen = num_chosen
        return x_Th[order_P // num_chosen]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place_P,) = ctx.saved_tensors
        return grads[0][place_P].unflatten(0, (-1, ctx.num_chosen)).sum(1), None, None, None


class _ToTokens(torch.autograd.Function):
    """The pairs in the order of the tokens."""

    @staticmethod
    def forward(ctx: Any, y_Ph: Tensor, order_P: Tensor, place_P: Tensor) -> Tensor:
        ctx.save_for_backward(order_P)
        return y_Ph[place_P]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order_P,) = ctx.saved_tensors
        return grads[0][order_P], None, None
