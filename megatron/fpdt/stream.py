"""What the streamed pieces of a model share: the store, the tiles' kernel, the ranks, and the length of a chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron.config import Recompute
from megatron.core.collectives import Exchange, heads_to_tokens, start_tokens_to_heads
from megatron.core.parallel_state import ParallelState
from megatron.core.ranges import TOKEN_WISE, named_range
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.store import ChunkStore
from megatron.ops.attention import AttentionBackend
from megatron.ops.gradient_sum import GradientSum

BACKWARD_RUNS_ONCE = (
    "a streamed backward pass runs once: what the forward pass kept is gone, whatever retain_graph says"
)

# Long enough for products at full speed, short enough for the widest activation of a large MLP.
SLICE_LENGTH = 8192

Row = TypeVar("Row")

# phase ("forward" or "backward"), layer number, chunk, number of chunks
ProgressReport = Callable[[str, int, int, int], None]


def no_report(phase: str, layer_number: int, chunk: int, num_chunks: int) -> None:
    """Report to nobody."""


# phase, what was computed, layer number (None outside of the layers), chunk, its value on the compute device
Note = Callable[[str, str, int | None, int | None, Tensor], None]

# What of a layer is noted; in the backward pass it is their gradients.
PROJECTED = ("queries", "keys and values")
INPUT, ATTENTION_OUTPUT, OUTPUT = "input", "attention output", "output"


def no_note(phase: str, what: str, layer_number: int | None, chunk: int | None, value: Tensor) -> None:
    """Take no notice."""


WholeParameters = Callable[[Iterable[nn.Parameter]], AbstractContextManager[None]]


def already_whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """A context that changes nothing: parameters that are not partitioned."""
    return nullcontext()


class StreamedModule(Protocol):
    """What follows the attention in a block."""

    layer_number: int

    def after(self, x_SBh: Tensor, o_SBHD: Tensor, output_needed: bool = True) -> tuple[Tensor, Tensor]:
        """Token-wise: two addends of the block's output [S, B, h].

        With output_needed=False their values may be anything; their gradients are what counts.
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class CausalBlock(StreamedModule, Protocol):
    """What a module must be to be streamed."""

    softmax_scale: float

    @property
    def uses_dropout(self) -> bool:
        """Whether `after` draws random numbers now."""
        ...

    def before(self, x_SBh: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Token-wise: q [S, B, H, D] and kv [S, B, 2K, D], K keys and then K values."""
        ...

    def weights_of_kept_products(self, recompute: Recompute) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights of the linear layers in `before` and in `after` that are not to be recomputed."""
        ...


@dataclass
class Stream:
    """How chunks are executed. `chunk_length` counts global tokens, `slice_length` this rank's.

    Token-wise work on a chunk runs in slices, so that the widest activation (the MLP's) is bounded apart from the
    chunk. The input of every `checkpoint_interval`-th block is kept for the backward pass; `recompute` says which of a
    block's matrix products are run again there. Within `whole_parameters` parameters are whole, also where they are
    partitioned and their block is neither in its forward nor in its backward pass. `note` is shown what is computed.
    """

    store: ChunkStore
    attention: AttentionBackend
    parallel_state: ParallelState
    chunk_length: int
    slice_length: int = SLICE_LENGTH
    report: ProgressReport = no_report
    note: Note = no_note
    checkpoint_interval: int = 1
    recompute: Recompute = "all"
    whole_parameters: WholeParameters = already_whole
    token_losses: list[Tensor] | None = None  # where a loss without gradients leaves those of its tokens, tile by tile
    block_inputs: Callable[[], Any] = lambda: None  # the chain that the block that ran last belongs to
    block_below: Callable[[], Any] = lambda: None  # what the block that ran last keeps for its backward pass

    def piece(self, phase: str, layer_number: int, chunk: int, num_chunks: int) -> AbstractContextManager[object]:
        """Report that a piece of work begins; a range of the timeline until it ends."""
        self.report(phase, layer_number, chunk, num_chunks)
        return named_range(f"layer {layer_number} {phase} chunk {chunk}")

    def noted(self, phase: str, what: str, layer_number: int | None, chunk: int, value: Tensor) -> Tensor:
        """Show a value to who takes notes; returns it."""
        self.note(phase, what, layer_number, chunk, value)
        return value

    def layout(self, x_SBh: Tensor) -> SequenceLayout:
        """Layout of the sequence of which x holds this rank's tokens."""
        size = self.parallel_state.sequence_parallel_size
        sequence_length = x_SBh.shape[0] * size
        return SequenceLayout(sequence_length, min(self.chunk_length, sequence_length), size)

    def output(
        self,
        block: StreamedModule,
        x_SBh: Tensor,
        o_SBHD: Tensor,
        kept: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """The block's output for one chunk, slice by slice; all but the first within `kept`."""
        y = torch.empty_like(x_SBh)
        for s in self.slices(len(x_SBh)):
            with kept() if s.start else nullcontext(), named_range(TOKEN_WISE):
                torch.add(*block.after(x_SBh[s], o_SBHD[s]), out=y[s])
        return y

    def start_tokens_to_heads(self, tensors: Sequence[Tensor], parts: Sequence[int] | None = None) -> Exchange:
        """Ulysses all-to-all of one chunk, under way."""
        return start_tokens_to_heads(tensors, self.parallel_state.sequence_parallel_group, parts)

    def heads_to_tokens(self, tensors: Sequence[Tensor], parts: Sequence[int] | None = None) -> list[Tensor]:
        """The way back."""
        return heads_to_tokens(tensors, self.parallel_state.sequence_parallel_group, parts)

    def started_ahead(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Rows of tiles as they are started: with more than one rank each before the row before it is executed.

        The all-to-all of a row then travels behind the attention of the one before. A single rank has nothing to
        hide, and saves the memory.
        """
        return _one_ahead(rows) if self.starts_rows_ahead else rows

    @property
    def starts_rows_ahead(self) -> bool:
        """Whether `started_ahead` starts a row before the one before it is executed."""
        return self.parallel_state.sequence_parallel_group is not None

    def on_device(self, tensor: Tensor) -> Tensor:
        """A small input (tokens, labels, positions of one chunk) on the compute device."""
        return tensor.to(self.store.device, non_blocking=True)

    def slices(self, num_tokens: int) -> Iterator[slice]:
        """Slices of a chunk's local tokens for token-wise work."""
        return (slice(start, start + self.slice_length) for start in range(0, num_tokens, self.slice_length))


def _one_ahead(rows: Iterator[Row]) -> Iterator[Row]:
    ahead = deque(islice(rows, 1))
    while ahead:
        ahead.extend(islice(rows, 1))
        yield ahead.popleft()


class GradientSums:
    """Sums of parameter gradients over chunks. Linear layers that run within `collecting` add theirs by themselves."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._sums = [GradientSum() for _ in parameters]

    def __getitem__(self, index: int) -> GradientSum:
        return self._sums[index]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hang each sum on its parameter, where `megatron.ops.linear` looks for it."""
        for parameter, gradient_sum in zip(self.parameters, self._sums, strict=True):
            parameter.gradient_sum = gradient_sum  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for parameter in self.parameters:
                del parameter.gradient_sum  # type: ignore[attr-defined]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one contribution per parameter; None where there is none."""
        for gradient_sum, gradient in zip(self._sums, gradients, strict=True):
            if gradient is not None:
                gradient_sum.add(gradient)

    def result(self, scale: Tensor | None = None) -> list[Tensor | None]:
        """The sums in the dtypes of the parameters, times `scale` where it is given; the sums end here."""
        results: list[Tensor | None] = []
        for parameter, gradient_sum in zip(self.parameters, self._sums, strict=True):
            total, gradient_sum.total = gradient_sum.total, None
            if total is not None and scale is not None:
                total.mul_(scale)
            results.append(None if total is None else total.to(parameter.dtype))
        return results
