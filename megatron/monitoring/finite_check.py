"""Which rank met the first value that is not finite, and where: in which layer, pass and chunk.

Every piece of a step leaves the norm of what it has computed in a vector on the device: one kernel, and nothing waits.
Before the optimizer takes its step the host asks once whether the loss and the gradients are finite on all ranks. If
they are not, the norms of that very step tell what came first, and nothing is run again. All ranks note the same pieces
in the same order, so that places in the order compare across ranks. Gradients of weights come last: nothing else of the
step is made from them. The weights are still those of the forward pass: whether they are finite tells a model that was
poisoned before from a step that overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.fpdt.stream import Stream

BLOCK = 4096  # norms that memory is taken for at a time


class NotFiniteError(Exception):
    """A step or its weights are not finite; the message names the rank and the place."""


@dataclass(frozen=True)
class Place:
    """What was computed. `chunk` is None for what is of the whole sequence; `layer` counts from 1."""

    phase: str
    what: str
    layer: int | None
    chunk: int | None
    microbatch: int


@dataclass(frozen=True)
class Finding:
    """What one rank found: the first place of its own and where that is in the order of all, and weights."""

    order: tuple[bool, int] | None = None
    place: Place | None = None
    weights: list[str] = field(default_factory=list)


class FiniteCheck:
    """Looks at every step of a training, on every rank."""

    def __init__(
        self, stream: Stream, model: nn.Module, find_weights: Callable[[], list[str]], seq_length: int
    ) -> None:
        """Take notes of `stream` and of the gradients of `model`; `find_weights` names weights that are not finite."""
        self._stream, self._find_weights, self._seq_length = stream, find_weights, seq_length
        self._norms = _Norms(stream.store.device)
        self._places: list[Place] = []
        self._results: list[int] = []  # the places of the loss and of the parameters' gradients
        self._microbatch: int | None = None  # None outside of a step: evaluations are not looked at
        stream.note = self.note
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._note_result, "backward", f"weights of {_with_layer(name)}"))

    def start_microbatch(self, number: int) -> None:
        """Take notes of a micro-batch of the step; the first, 0, begins anew."""
        if number == 0:
            self._norms.clear()
            self._places.clear()
            self._results.clear()
        self._microbatch = number

    def note(self, phase: str, what: str, layer: int | None, chunk: int | None, value: Tensor) -> None:
        """Note what a piece of the step has computed. Does not wait for the device."""
        if self._microbatch is not None:
            self._places.append(Place(phase, what, layer, chunk, self._microbatch))
            self._norms.append(value)

    def finish(self, loss: Tensor) -> str | None:
        """Say where the first value that is not finite is, if the loss or a gradient of any rank is not; end the step.

        `loss` is this rank's, a scalar. To be called before the optimizer's step, and by all ranks: collective over
        them. Waits for the device.
        """
        self._note_result("forward", "sum of the losses", loss)
        self._microbatch = None
        norms = self._norms.values()
        is_faulty = (~norms[self._results].isfinite().all()).float()
        dist.all_reduce(is_faulty, dist.ReduceOp.MAX)
        if not is_faulty.item():
            return None
        return first_fault(gather(self._finding(norms)), self._stream.chunk_length, self._seq_length)

    def _note_result(self, phase: str, what: str, value: Tensor) -> None:
        self._results.append(len(self._places))
        self.note(phase, what, None, None, value)

    def _finding(self, norms: Tensor) -> Finding:
        faulty = (~norms.isfinite()).nonzero().flatten().tolist()
        if not faulty:
            return Finding(weights=self._find_weights())
        results = set(self._results)
        is_result, first = min((index in results, index) for index in faulty)
        return Finding((is_result, first), self._places[first], self._find_weights())


def gather(finding: Finding) -> list[Finding]:
    """The findings of all ranks, in their order. Collective over all ranks."""
    findings = [Finding()] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    return findings


def first_fault(findings: Sequence[Finding], chunk_length: int, seq_length: int) -> str | None:
    """Say what came first over all ranks: weights, or else a place; None if all is finite."""
    if (weights := weights_not_finite(findings)) is not None:
        return f"{weights} already"
    orders = [finding.order for finding in findings if finding.order is not None]
    if not orders:
        return None
    ranks = [rank for rank, finding in enumerate(findings) if finding.order == min(orders)]
    place = findings[ranks[0]].place
    assert place is not None
    where = _described(place, chunk_length, seq_length)
    return f"{_ranks(ranks)}: the first value that is not finite is {where}; all weights are finite"


def weights_not_finite(findings: Sequence[Finding]) -> str | None:
    """Name the first weights that are not finite, and the ranks that hold them; None if all are."""
    ranks = [rank for rank, finding in enumerate(findings) if finding.weights]
    if not ranks:
        return None
    first, *others = findings[ranks[0]].weights
    more = f" and {len(others)} more" if others else ""
    return f"{_ranks(ranks)}: the weights of {_with_layer(first)}{more} are not finite"


def _described(place: Place, chunk_length: int, seq_length: int) -> str:
    what = f"the gradient of the {place.what}" if place.phase == "backward" else f"the {place.what}"
    layer = "" if place.layer is None else f" of layer {place.layer}"
    chunk = ""
    if place.chunk is not None:
        first = place.chunk * chunk_length
        chunk = f", chunk {place.chunk}: positions {first}-{min(first + chunk_length, seq_length)}"
    return f"{what}{layer} ({place.phase}, micro-batch {place.microbatch}{chunk})"


def _with_layer(name: str) -> str:
    """ "layer 3 (layers.2.mlp.dense_h_to_4h.weight)"; a name outside of the layers as it is."""
    first, *rest = name.split(".")
    return f"layer {int(rest[0]) + 1} ({name})" if first == "layers" else name


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 1} more, {', '.join(map(str, ranks[1:9]))}" if len(ranks) > 1 else ""
    return f"rank {ranks[0]}{more}"


class _Norms:
    """A growing vector of norms in fp32; its memory is kept for the next step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self._count = 0

    def append(self, value: Tensor) -> None:
        block, index = divmod(self._count, BLOCK)
        if block == len(self._blocks):
            self._blocks.append(torch.empty(BLOCK, device=self._device))
        # The 2-norm reads once and makes no copy; NaN and infinity go through it.
        torch.linalg.vector_norm(value.detach(), dtype=torch.float32, out=self._blocks[block][index])
        self._count += 1

    def values(self) -> Tensor:
        return torch.cat(self._blocks)[: self._count]

    def clear(self) -> None:
        self._count = 0
