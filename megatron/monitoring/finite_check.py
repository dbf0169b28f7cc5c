"""Search for the first value that is not finite (NaN or infinity): its rank, layer, pass and chunk.

Each piece of a step writes the norm of its result to a vector on the device: one kernel, no synchronization. Before the
optimizer's step the host checks once whether the loss and the gradients are finite on all ranks. If they are not, the
norms of that step show which value came first, without recomputation. All ranks record the same pieces in the same
order, so positions in the order compare across ranks. Gradients of weights come last: nothing else in the step depends
on them. The weights are still those of the forward pass: whether they are finite separates a model that was poisoned
earlier from a step that overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.observer import Observer

BLOCK = 4096  # norms allocated at a time
HOW_TO_RESUME = (
    "earlier checkpoints are intact, resume from one with --load and --ckpt-step, and a lower --lr or other data"
)


class NotFiniteError(Exception):
    """A step or its weights are not finite; the message names the rank and the place."""


@dataclass(frozen=True)
class Place:
    """A computed value in the step. `chunk` is None for one of the whole sequence; `layer` counts from 1."""

    phase: str
    what: str
    layer: int | None
    chunk: int | None
    microbatch: int


@dataclass(frozen=True)
class Finding:
    """The result of one rank: its first faulty place, the position of that in the common order, and faulty weights."""

    order: tuple[bool, int] | None = None
    place: Place | None = None
    weights: list[str] = field(default_factory=list)


class StepRecord(Observer):
    """Records the norm of each value of a training step, and where it was computed. Does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._norms = _Norms(device)
        self._places: list[Place] = []
        self._results: list[int] = []  # the places of the loss and of the parameters' gradients
        self._microbatch: int | None = None  # None outside of a step: evaluations are not recorded

    def start_microbatch(self, number: int) -> None:
        """Record a micro-batch of the step; the first, 0, clears the records of the last step."""
        if number == 0:
            self._norms.clear()
            self._places.clear()
            self._results.clear()
        self._microbatch = number

    def note(self, phase: str, what: str, layer_number: int | None, chunk: int | None, value: Tensor) -> None:
        if self._microbatch is not None:
            self._places.append(Place(phase, what, layer_number, chunk, self._microbatch))
            self._norms.append(value)

    def note_result(self, phase: str, what: str, value: Tensor) -> None:
        """Record a result of the step: the loss, or a parameter's gradient."""
        self._results.append(len(self._places))
        self.note(phase, what, None, None, value)

    def finish(self) -> Tensor:
        """End the step; return all norms, in order."""
        self._microbatch = None
        return self._norms.values()

    def is_faulty(self, norms: Tensor) -> Tensor:
        """Return 1 on the device if a result is not finite, else 0."""
        return (~norms[self._results].isfinite().all()).float()

    def first_fault(self, norms: Tensor) -> tuple[tuple[bool, int], Place] | tuple[None, None]:
        """Return the order and place of the first value that is not finite, if any. Waits for the device."""
        faulty = (~norms.isfinite()).nonzero().flatten().tolist()
        if not faulty:
            return None, None
        results = set(self._results)
        is_result, first = min((index in results, index) for index in faulty)
        return (is_result, first), self._places[first]


class FiniteCheck:
    """Checks every training step, on every rank."""

    def __init__(self, record: StepRecord, model: nn.Module, find_weights: Callable[[], list[str]]) -> None:
        """Record gradients of `model` too; `record` observes its stream. `find_weights` names weights not finite."""
        self._record, self._find_weights = record, find_weights
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(record.note_result, "backward", f"weights of {_with_layer(name)}"))

    def start_microbatch(self, number: int) -> None:
        """Begin a micro-batch of the step, numbered from 0."""
        self._record.start_microbatch(number)

    def finish(self, loss: Tensor, layout: SequenceLayout) -> str | None:
        """End the step; describe the first value that is not finite if the loss or a gradient of any rank is not.

        `loss` is this rank's, a scalar, of sequences with this `layout`. Call it before the optimizer's step.
        Collective over all ranks. Waits for the device.
        """
        self._record.note_result("forward", "sum of the losses", loss)
        norms = self._record.finish()
        is_faulty = self._record.is_faulty(norms)
        dist.all_reduce(is_faulty, dist.ReduceOp.MAX)
        if not is_faulty.item():
            return None
        order, place = self._record.first_fault(norms)
        finding = Finding(order, place, self._find_weights())
        return first_fault(gather(finding), layout.chunk_length, layout.sequence_length)


def gather(finding: Finding) -> list[Finding]:
    """Return the findings of all ranks, in rank order. Collective over all ranks."""
    findings = [Finding()] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    return findings


def first_fault(findings: Sequence[Finding], chunk_length: int, seq_length: int) -> str | None:
    """Describe the first fault over all ranks: weights, or else a place; None if all values are finite."""
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


def faulty_weights(own: list[str]) -> str | None:
    """Describe the weights of any rank that are not finite, given this rank's. Collective over all ranks."""
    return weights_not_finite(gather(Finding(weights=own)))


def weights_not_finite(findings: Sequence[Finding]) -> str | None:
    """Name the first weights that are not finite, and the ranks that have them; None if all are finite."""
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
    """ "layer 3 (layers.2.mlp.dense_h_to_4h.weight)"; a name outside of the layers is unchanged."""
    first, *rest = name.split(".")
    return f"layer {int(rest[0]) + 1} ({name})" if first == "layers" else name


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 1} more, {', '.join(map(str, ranks[1:9]))}" if len(ranks) > 1 else ""
    return f"rank {ranks[0]}{more}"


class _Norms:
    """A growing vector of norms in fp32, which reuses its memory in the next step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self._count = 0

    def append(self, value: Tensor) -> None:
        block, index = divmod(self._count, BLOCK)
        if block == len(self._blocks):
            self._blocks.append(torch.empty(BLOCK, device=self._device))
        # The 2-norm reads once and makes no copy; it propagates NaN and infinity.
        torch.linalg.vector_norm(value.detach(), dtype=torch.float32, out=self._blocks[block][index])
        self._count += 1

    def values(self) -> Tensor:
        return torch.cat(self._blocks)[: self._count]

    def clear(self) -> None:
        self._count = 0
