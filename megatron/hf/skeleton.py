"""A transformers model without its layers: what comes before and after them, by the model's own forward.

Each layer's `forward` is replaced by a stub that passes its input on. So the model's code runs as it is, and gives

    embed       the first layer's input
    arguments   what a layer gets besides its input: cos and sin, positions, ..; of any slice of tokens
    logits      norm, head, scaling: whatever follows the last layer

The model takes inputs in place of embedded tokens for the last two. Modules that still add to them, such as learned
positions, are bypassed: they return zeros, so that their weights may be partitioned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Attributes of transformers' modules: the stream recomputes activations by itself, and a check of the tokens would
# wait for the device.
_REPLACED: dict[str, Any] = {
    "gradient_checkpointing": False,
    "warn_if_padding_and_no_attention_mask": lambda *tokens_and_mask: None,
}

# Takes the number of a layer, its input and its other arguments; returns its output.
Visit = Callable[[int, Tensor, dict[str, Any]], Tensor]


class _Reached(BaseException):
    """The forward pass has reached the layer that was asked for. No handler of the model's code takes it."""

    def __init__(self, x: Tensor, arguments: dict[str, Any]) -> None:
        self.x, self.arguments = x, arguments


class _Layers(nn.ModuleList):
    """A list of layers of which a slice is a plain list: models take one whenever they run."""

    def __getitem__(self, index: Any) -> Any:
        return [*self._modules.values()][index] if isinstance(index, slice) else super().__getitem__(index)


class Skeleton:
    """A model and its decoder layers, replaced by stubs. `layer_forward` runs a layer itself."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self.model, self.layers = model, tuple(layers)
        layers.__class__ = _Layers
        self.returns_tuples = False
        """Whether the model takes a layer's output as the first of a tuple."""
        self._visit: Visit | None = None
        self._bypasses = False
        for number, layer in enumerate(self.layers):
            names = list(inspect.signature(type(layer).forward).parameters)[1:]
            layer.forward = partial(self._stub, number, names)
        for module in model.modules():
            for name, replacement in _REPLACED.items():
                if hasattr(module, name):
                    setattr(module, name, replacement)

    def run(self, visit: Visit, tensors: Mapping[str, Tensor] | None = None, **inputs: Any) -> Any:
        """Run the model; `visit` stands in for the layers, and `tensors` by name for parameters and buffers."""
        self._visit = visit
        try:
            if tensors is None:
                return self.model(use_cache=False, **inputs)
            return functional_call(self.model, dict(tensors), kwargs={"use_cache": False, **inputs})
        finally:
            self._visit = None

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the first layer's input [B, T, h]."""
        return self._reach(0, input_ids=tokens_BT, position_ids=positions_BT).x

    @torch.no_grad()
    def arguments(self, number: int, x_BTh: Tensor, positions_BT: Tensor) -> dict[str, Any]:
        """Return what a layer gets besides its input, for tokens at these positions; x gives shape and dtype."""
        with self._bypassing():
            return self._reach(number, inputs_embeds=x_BTh, position_ids=positions_BT).arguments

    @torch.no_grad()
    def arguments_of_all(self, x_BTh: Tensor, positions_BT: Tensor) -> list[dict[str, Any]]:
        """Return what each layer gets besides its input."""
        found: list[dict[str, Any]] = []
        with self._bypassing():
            last = len(self.layers) - 1
            found.append(self._reach(last, found.append, inputs_embeds=x_BTh, position_ids=positions_BT).arguments)
        return found

    def logits(self, x_BTh: Tensor) -> Tensor:
        """Compute the logits [B, T, V] from the last layer's output."""
        with self._bypassing():
            logits: Tensor = self.run(lambda number, x, arguments: x_BTh, inputs_embeds=x_BTh).logits
        return logits

    def layer_forward(self, number: int, x_BTh: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Run a layer's own forward."""
        layer = self.layers[number]
        y = type(layer).forward(layer, x_BTh, **arguments)
        output: Tensor = y[0] if isinstance(y, tuple) else y
        return output

    def bypass(self, module: nn.Module, output_tail: Sequence[int]) -> None:
        """Let a module return zeros [B, T, *output_tail] where its output is not asked for."""
        module.forward = partial(self._bypassed, module.forward, next(module.parameters()).dtype, output_tail)

    @contextmanager
    def _bypassing(self) -> Iterator[None]:
        self._bypasses = True
        try:
            yield
        finally:
            self._bypasses = False

    def _reach(
        self, number: int, pass_by: Callable[[dict[str, Any]], object] = lambda arguments: None, **inputs: Any
    ) -> _Reached:
        """Run the model up to a layer; `pass_by` gets the arguments of the layers before it."""

        def visit(visited: int, x: Tensor, arguments: dict[str, Any]) -> Tensor:
            if visited == number:
                raise _Reached(x, arguments)
            pass_by(arguments)
            return x

        try:
            self.run(visit, **inputs)
        except _Reached as reached:
            return reached.with_traceback(None)
        raise RuntimeError(f"the model has not called its layer {number}")

    def _stub(self, number: int, names: Sequence[str], *args: Any, **arguments: Any) -> Any:
        if self._visit is None:
            raise RuntimeError("a layer of a streamed model runs outside of the stream; call the model that streams it")
        arguments = {**dict(zip(names, args, strict=False)), **arguments}
        y = self._visit(number, arguments.pop(names[0]), arguments)
        return (y,) if self.returns_tuples else y

    def _bypassed(
        self, forward: Callable[..., Tensor], dtype: torch.dtype, tail: Sequence[int], *args: Any, **kwargs: Any
    ) -> Tensor:
        if not self._bypasses:
            return forward(*args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()))
        return first.new_zeros((), dtype=dtype).expand(*first.shape[:2], *tail)
