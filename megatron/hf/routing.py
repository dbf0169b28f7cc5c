"""The routers of a mixture of experts: the auxiliary loss that balances the experts, and the experts' load.

    C_e    how often expert e is among a token's k most probable ones, over all layers, tokens and ranks
    P_e    the sum of its probabilities over the same; R = layers x tokens; E experts
    auxiliary loss = E sum over e of (C_e / R) (P_e / R)

It is that of transformers' `load_balancing_loss_func` on the logits of all layers and tokens at once. C has no gradient
and is known after the forward pass, so the gradient of a probability of expert e is E C_e / R^2 for every token and
layer. A router's scores pass through a function that adds it to the gradient of the router's logits, in whatever
backward run computes them: of a slice, a chunk or the whole sequence.

The loss of a rank is a sum over tokens, later divided by their number N, so its part of the auxiliary loss is

    coefficient N E sum over e of (C_e / R) (the rank's own P_e / R)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.hf.errors import UnsupportedModelError
from megatron.hf.experts import count
from megatron.ops.gradient_sum import accumulation_dtype

# fp32 cannot count the choices of a long sequence.
_SUMS = torch.float64
_WITHOUT = "set output_router_logits to false, and it trains without"


@dataclass(frozen=True)
class AuxiliaryLoss:
    """The auxiliary loss that a model's settings ask for."""

    coefficient: float
    num_experts: int
    num_chosen: int

    @classmethod
    def taken_from(cls, model: Any) -> AuxiliaryLoss | None:
        """Return what the settings ask for, and let the model itself not compute it: it sees no layer.

        None where the model has no such loss, or its settings do not ask for it. UnsupportedModelError for another one.
        """
        config = model.config.get_text_config()
        if not getattr(config, "output_router_logits", False):
            return None
        config.output_router_logits = False
        coefficient = getattr(model, "router_aux_loss_coef", None)
        if not coefficient:
            return None
        name = type(model).__name__
        if not _router_classes(model):
            raise UnsupportedModelError(
                f"{name} does not say which of its modules are routers; set router_aux_loss_coef to 0"
            )
        loss = cls(float(coefficient), int(model.num_experts), int(model.num_experts_per_tok))
        theirs = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        other = UnsupportedModelError(f"{name} balances its experts by another loss than others do; {_WITHOUT}")
        try:
            if theirs is not None and loss.equals(theirs):
                return loss
        except Exception as error:  # it takes other arguments
            raise other from error
        raise other

    def chosen(self, probabilities_TE: Tensor) -> Tensor:
        """Count how often each expert is among a token's most probable ones."""
        return count(probabilities_TE.topk(self.num_chosen, -1).indices, self.num_experts)

    def value(self, chosen_E: Tensor, probabilities_E: Tensor, num_rows: Tensor) -> Tensor:
        """Return the loss for sums over all rows."""
        return self.num_experts * (chosen_E * probabilities_E).sum() / num_rows**2

    def equals(self, theirs: Callable[..., Any]) -> bool:
        """Whether a model's own function returns the same for the logits of two layers."""
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(2, 64, self.num_experts, generator=generator)
        value = theirs(tuple(logits), self.num_experts, self.num_chosen, None)
        p = logits.flatten(0, 1).softmax(-1)
        return torch.allclose(torch.as_tensor(value), self.value(self.chosen(p), p.sum(0), torch.tensor(len(p))))


class Routing:
    """Counts what the routers choose in a forward pass, and adds the gradient of the auxiliary loss to their own.

    Counts are summed over `group`; with None, this rank has all tokens.
    """

    def __init__(
        self, routers: Sequence[nn.Module], loss: AuxiliaryLoss | None, streams: bool, group: dist.ProcessGroup | None
    ) -> None:
        """`streams`: layers run without gradients in the forward pass. One that has them is not counted."""
        self.loss, self.group = loss, group
        self._streams, self._is_counting = streams, False
        self._num_routers = len(routers)
        self._sums: _Sums | None = None
        self._gradient_E: Tensor | None = None  # of each token's probabilities, in this backward pass
        self._reported: list[Tensor] = []
        self._num_reported = 0
        for number, router in enumerate(routers):
            router.register_forward_hook(lambda module, args, output, number=number: self._see(number, module, output))

    @classmethod
    def of(
        cls, model: Any, loss: AuxiliaryLoss | None, streams: bool, group: dist.ProcessGroup | None
    ) -> Routing | None:
        """Return the routing of a model whose routers transformers knows; None without any."""
        classes = _router_classes(model)
        routers = [module for module in model.modules() if isinstance(module, classes)] if classes else []
        return cls(routers, loss, streams, group) if routers else None

    def start(self) -> None:
        """Count from here to `finish`."""
        self._is_counting, self._sums = True, None

    def finish(self, loss: Tensor, mask_BS: Tensor) -> Tensor:
        """Return a forward pass' loss, the same number, with the auxiliary loss in its gradient.

        Collective over the group.
        """
        self._is_counting, sums, self._sums = False, self._sums, None
        if sums is None:
            return loss
        num_tokens = sums.over(self.group, mask_BS)
        imbalance = (sums.load_LE.max(1).values / sums.load_LE.mean(1)).max()
        values = [imbalance]
        if self.loss is not None:
            values.append(self.loss.value(sums.chosen_E, sums.probabilities_E, sums.num_rows))
            of_tokens = self.loss.coefficient * self.loss.num_experts * num_tokens
            loss = _Balanced.apply(loss, self, of_tokens * sums.chosen_E / sums.num_rows**2)
        self._reported = [a + b for a, b in zip(self._reported, values, strict=True)] if self._reported else values
        self._num_reported += 1
        return loss

    def take_report(self) -> dict[str, float]:
        """Return the means of the forward passes since the last call, by their names in the log. Waits for the device.

        The imbalance is the load of the busiest expert over the mean load, of the layer where it is largest.
        """
        if not self._num_reported:
            return {}
        means = (torch.stack(self._reported) / self._num_reported).tolist()
        self._reported, self._num_reported = [], 0
        return dict(zip(("expert_imbalance", "router_aux_loss"), means, strict=False))

    def begin_backward(self, gradient_E: Tensor) -> None:
        """Take the gradient of each token's probabilities, which the layers' backward passes add from here on."""
        self._gradient_E = gradient_E

    def gradient(self, logits_TE: Tensor) -> Tensor:
        """Return the gradient of a router's logits."""
        if self._gradient_E is None:
            raise RuntimeError("a router's backward pass runs before that of the model's loss, which balances experts")
        p_TE = logits_TE.softmax(-1, dtype=accumulation_dtype(logits_TE.dtype))
        dp_E = self._gradient_E.to(p_TE.dtype)
        return (p_TE * (dp_E - (p_TE @ dp_E)[:, None])).to(logits_TE.dtype)

    def _see(self, number: int, router: nn.Module, output: Any) -> Any:
        """Count a router's output (logits, scores, chosen experts); return it with the balance in its gradient."""
        if not router.training:
            return None
        if not (isinstance(output, tuple) and len(output) == 3):
            if self.loss is None:
                return None
            raise UnsupportedModelError(f"{type(router).__name__} does not return logits, scores and chosen experts")
        logits_TE, scores, chosen = output
        gradients = torch.is_grad_enabled()
        if self._is_counting and not (gradients and self._streams):
            self._count(number, logits_TE.detach(), chosen)
        if self.loss is None or not gradients:
            return None
        return logits_TE, _WithBalance.apply(scores, logits_TE, self), chosen

    @torch.no_grad()
    def _count(self, number: int, logits_TE: Tensor, chosen: Tensor) -> None:
        num_experts = logits_TE.shape[-1]
        if self._sums is None:
            self._sums = _Sums(self._num_routers, num_experts, logits_TE.device)
        self._sums.load_LE[number] += count(chosen, num_experts)
        self._sums.num_rows += len(logits_TE)
        if self.loss is not None:
            p_TE = logits_TE.softmax(-1, dtype=accumulation_dtype(logits_TE.dtype))
            self._sums.chosen_E += self.loss.chosen(p_TE)
            self._sums.probabilities_E += p_TE.sum(0)


class _Sums:
    """Sums over the rows of a forward pass."""

    def __init__(self, num_routers: int, num_experts: int, device: torch.device) -> None:
        # Views of one tensor, which is reduced at once.
        self._all = torch.zeros(num_routers * num_experts + 2 * num_experts + 2, dtype=_SUMS, device=device)
        load, *of_experts, numbers = self._all.split([num_routers * num_experts, num_experts, num_experts, 2])
        self.load_LE = load.view(num_routers, num_experts)
        self.chosen_E, self.probabilities_E = of_experts
        self.num_rows, self._num_tokens = numbers[0], numbers[1]

    def over(self, group: dist.ProcessGroup | None, mask_BS: Tensor) -> Tensor:
        """Sum over the ranks of a group; return the number of tokens that count in the loss."""
        self._num_tokens += mask_BS.sum().to(self._all.device, _SUMS, non_blocking=True)
        if group is not None:
            dist.all_reduce(self._all, group=group)
        return self._num_tokens


class _Balanced(torch.autograd.Function):
    """A loss; its backward pass begins that of the auxiliary loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, routing: Routing, gradient_E: Tensor) -> Tensor:
        ctx.routing = routing
        ctx.save_for_backward(gradient_E)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_E,) = ctx.saved_tensors
        ctx.routing.begin_backward(grads[0].to(gradient_E.dtype) * gradient_E)
        return grads[0], None, None


class _WithBalance(torch.autograd.Function):
    """A router's scores; the gradient of its logits gains that of the auxiliary loss."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, logits_TE: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        ctx.save_for_backward(logits_TE)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logits_TE,) = ctx.saved_tensors
        return grads[0], ctx.routing.gradient(logits_TE), None


def _router_classes(model: Any) -> tuple[type[nn.Module], ...]:
    """Return the classes of the modules that transformers records as routers of a model."""
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    entries = recorded if isinstance(recorded, list | tuple) else [recorded]
    classes = [getattr(entry, "target_class", entry) for entry in entries if entry is not None]
    return tuple(each for each in classes if isinstance(each, type))
