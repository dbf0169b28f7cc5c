"""The seam between a layer and the stream that executes it: the layer's one attention call.

A layer is an ordinary module whose `forward` calls `StreamedAttention` once. The stream runs it in two ways:

    SuspendedLayer     forward pass: the layer runs up to its attention call and is suspended there, in its own
                       greenlet, while the tiles run; then it resumes with their output o
    run_with_output    o is known: the layer runs in one piece; the backward pass builds both graphs this way, y from
                       (x, o) and the projections from x

A greenlet shares gradient mode and autocast state with all other code of its thread, and starts with empty context
variables. So both states are swapped at each switch, and the context is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from megatron.core.documents import Documents
from megatron.ops.attention import AttentionVariant
from megatron.ops.linear import LinearTape
from megatron.ops.merge import check_sinks


class AttentionCall(NamedTuple):
    """The arguments of a layer's attention call: this rank's tokens, all heads."""

    q_cBHD: Tensor
    kv_cBKD: Tensor
    """K keys, then K values."""

    variant: AttentionVariant
    """How the tokens of the whole sequence attend to each other."""

    sinks_H: Tensor | None = None
    """A score per head that joins the softmax of every query, without a value. The same for all tokens."""


Attend = Callable[[AttentionCall], Tensor]

_attend: ContextVar[Attend] = ContextVar("attend")


class StreamedAttention:
    """The core attention of a streamed layer: passes its call to the code that runs the layer."""

    @torch.compiler.disable
    def __call__(
        self,
        q_SBHD: Tensor,
        kv_SBKD: Tensor,
        variant: AttentionVariant,
        dropout: float,
        documents: Documents | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Return o [S, B, H, D] for q [S, B, H, D] and kv [S, B, 2K, D]. The stream handles `documents`."""
        if dropout:
            raise ValueError(f"attention dropout ({dropout}) cannot be replayed by FPDT; use 0")
        check_sinks(sinks_H, q_SBHD)
        return _attend.get()(AttentionCall(q_SBHD, kv_SBKD, variant, sinks_H))


@dataclass(frozen=True)
class _ThreadState:
    """Gradient mode and autocast state, which a greenlet and its parent would otherwise share."""

    gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls, device_types: tuple[str, ...]) -> _ThreadState:
        return cls(
            torch.is_grad_enabled(),
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in device_types),
        )

    def restore(self) -> None:
        torch.set_grad_enabled(self.gradients)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


class SuspendedLayer:
    """One run of a layer, suspended at its attention call.

    `call` holds the arguments of that call. `finish` or `close` must follow, in the same thread: if the run is dropped,
    its garbage collection changes the gradient mode of the code that triggers it.
    """

    def __init__(self, forward: Callable[..., Tensor], tape: LinearTape, *args: Any) -> None:
        """Run `forward(*args)` on `tape` up to its attention call. RuntimeError if it makes none."""

        def run() -> Tensor:
            _attend.set(lambda call: getcurrent().parent.switch(call))
            with tape.running():
                return forward(*args)

        self._greenlet = greenlet(run)
        self._greenlet.gr_context = copy_context()
        self._device_types = tuple(dict.fromkeys((args[0].device.type, "cpu")))
        self._state = _ThreadState.current(self._device_types)
        call = self._switch()
        if self._greenlet.dead:
            raise RuntimeError("the layer has not called its attention, and cannot be streamed")
        self.call: AttentionCall = call

    def finish(self, o_cBHD: Tensor) -> Tensor:
        """Resume the layer with its attention output; return its output. RuntimeError if it calls attention again."""
        y: Tensor = self._switch(o_cBHD)
        if not self._greenlet.dead:
            self.close()
            raise RuntimeError("the layer has called its attention twice, and cannot be streamed")
        return y

    def close(self) -> None:
        """Abort the run if it has not finished."""
        if not self._greenlet.dead:
            self._switch(throw=True)

    def _switch(self, *value: Any, throw: bool = False) -> Any:
        outside = _ThreadState.current(self._device_types)
        if self._state != outside:
            self._state.restore()
        try:
            return self._greenlet.throw(GreenletExit) if throw else self._greenlet.switch(*value)
        finally:
            self._state = _ThreadState.current(self._device_types)
            if self._state != outside:
                outside.restore()


def run_with_output(forward: Callable[..., Tensor], tape: LinearTape, attend: Attend, *args: Any) -> Tensor:
    """Run `forward(*args)` on `tape` in one piece; `attend` returns the attention output for its call."""
    token = _attend.set(attend)
    try:
        with tape.running():
            return forward(*args)
    finally:
        _attend.reset(token)
