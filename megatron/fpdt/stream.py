"""What the streamed parts of a model share: the store, the attention backend, the ranks, and the chunk length."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from math import inf
from typing import Protocol, TypeVar

from torch import Tensor, nn

from megatron.config import Recompute
from megatron.core.collectives import Exchange, SharesToTokens, start_shares_to_heads
from megatron.core.head_layout import HeadLayout, RowShare
from megatron.core.parallel_state import ParallelState
from megatron.core.ranges import named_range
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.device_budget import EVERYTHING_ON_DEVICE, DeviceBudget
from megatron.fpdt.observer import Observer
from megatron.fpdt.store import ChunkStore
from megatron.ops.attention import AttentionBackend, AttentionVariant

BACKWARD_RUNS_ONCE = (
    "a streamed backward pass runs once: what the forward pass saved is released, whatever retain_graph says"
)

# Long enough for matrix products at full speed, short enough for the widest activation of a large MLP.
SLICE_LENGTH = 8192

Row = TypeVar("Row")

WholeParameters = Callable[[Iterable[nn.Parameter]], AbstractContextManager[None]]


def already_whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Return a context that does nothing, for parameters that are not partitioned."""
    return nullcontext()


class Layer(Protocol):
    """The interface of a layer that can be streamed.

    `forward` takes x [S, B, h] and positions [B, S] of any tokens, calls a `StreamedAttention` once, with the layer's
    `variant`, and returns y [S, B, h]. Everything else that it does is token-wise.
    """

    layer_number: int

    @property
    def variant(self) -> AttentionVariant:
        """How the tokens of the sequence attend to each other, known before the layer runs."""
        ...

    @property
    def forward(self) -> Callable[..., Tensor]: ...

    @property
    def uses_dropout(self) -> bool:
        """Whether the layer draws random numbers now."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Saving:
    """What sequences of one length save for backward, and the memory of the device that their chunks may use.

    `host_bytes` is the most that they need on the host, infinite if that is unknown.
    """

    recompute: Recompute
    checkpoint_interval: int
    device_budget: DeviceBudget
    host_bytes: float = inf


@dataclass(frozen=True, eq=False)
class Stream:
    """How chunks are executed. `chunk_length` counts global tokens, `slice_length` this rank's.

    With several ranks, `heads` are those of every layer. Token-wise work on a chunk runs in slices, so that the widest
    activation (the MLP's) is bounded independently of the chunk. The input of every `checkpoint_interval`-th block is
    saved for backward; `recompute` says which of a block's matrix products are recomputed there. Sequences of a length
    in `by_length` have their own of both. Within `whole_parameters`, partitioned parameters are gathered, even if their
    block is neither in its forward nor in its backward pass. The `observer` sees the values that are computed.
    """

    store: ChunkStore
    attention: AttentionBackend
    parallel_state: ParallelState
    heads: HeadLayout
    chunk_length: int
    slice_length: int = SLICE_LENGTH
    checkpoint_interval: int = 1
    recompute: Recompute = Recompute.ALL
    observer: Observer = field(default_factory=Observer)
    whole_parameters: WholeParameters = already_whole
    by_length: Mapping[int, Saving] = field(default_factory=dict)

    def begin_sequence(self, sequence_length: int) -> None:
        """Let chunks use the memory that sequences of this length may, until one of another length begins."""
        saving = self.saving_at(sequence_length)
        self.store.device_tier.limit(saving.device_budget)
        self.store.pool.begin_sequence(sequence_length, saving.host_bytes)

    def saving(self, x_SBh: Tensor) -> Saving:
        """Return what the sequence saves of which x holds this rank's tokens."""
        return self.saving_at(x_SBh.shape[0] * self.parallel_state.sequence_parallel_size)

    def saving_at(self, sequence_length: int) -> Saving:
        """Return what sequences of this length save."""
        return self.by_length.get(sequence_length, self._otherwise)

    @cached_property
    def _otherwise(self) -> Saving:
        budget = self.store.device_tier.budget or EVERYTHING_ON_DEVICE
        return Saving(self.recompute, self.checkpoint_interval, budget)

    def chunk(self, phase: str, layer_number: int, chunk: int) -> AbstractContextManager[object]:
        """Report that work on a chunk begins; return a named range of the profiler that ends with it."""
        self.observer.begin_chunk(phase, layer_number, chunk)
        return named_range(f"layer {layer_number} {phase} chunk {chunk}")

    def noted(self, phase: str, what: str, layer_number: int | None, chunk: int, value: Tensor) -> Tensor:
        """Show a value to the observer, and return it."""
        self.observer.note(phase, what, layer_number, chunk, value)
        return value

    def layout(self, x_SBh: Tensor) -> SequenceLayout:
        """Return the layout of the sequence of which x holds this rank's tokens."""
        return self.layout_of(x_SBh.shape[0] * self.parallel_state.sequence_parallel_size)

    def layout_of(self, sequence_length: int) -> SequenceLayout:
        """Return the layout of a sequence of so many global tokens."""
        return _layout(sequence_length, self.chunk_length, self.parallel_state.sequence_parallel_size)

    def start_tokens_to_heads(
        self, tensors: Sequence[Tensor], parts: Sequence[int] | None = None, num_shares: int = 1
    ) -> list[Exchange]:
        """Start the Ulysses all-to-all of one chunk from tokens to heads, share by share of a rank's heads."""
        group = self.parallel_state.sequence_parallel_group
        return start_shares_to_heads(tensors, group, self.heads, parts, num_shares)

    def shares_to_tokens(self, parts: Sequence[int] | None = None, num_shares: int = 1) -> SharesToTokens:
        """Prepare the Ulysses all-to-all of one chunk from heads back to tokens."""
        return SharesToTokens(self.parallel_state.sequence_parallel_group, self.heads, parts, num_shares)

    @cached_property
    def rows(self) -> RowShare:
        """The rows of every chunk that this rank attends with."""
        return self.heads.rows(self.parallel_state.sequence_parallel_rank)

    def own_entries(self, of_heads_H: Tensor) -> Tensor:
        """Return the entries of this rank's query heads in a tensor of one entry per head, as a view."""
        if self.parallel_state.sequence_parallel_group is None:
            return of_heads_H
        return self.heads.own_entries(of_heads_H, self.parallel_state.sequence_parallel_rank)

    def own_sinks(self, sinks_H: Tensor | None, num_shares: int) -> Sequence[Tensor | None]:
        """Return the sinks of this rank's heads, share by share as the heads are exchanged."""
        return [None] * num_shares if sinks_H is None else self.own_entries(sinks_H).chunk(num_shares)

    def num_head_shares(self, num_rows: int, num_tokens: int) -> int:
        """Return in how many shares the heads of a row are exchanged: two if no other row could hide the all-to-alls.

        A chunk of less than a slice is left whole: its kernels are short, and more of them would only take the host
        longer to launch.
        """
        is_alone = self.overlaps_rows and num_rows == 1 and num_tokens >= self.slice_length
        return 2 if is_alone and self.heads.divisible_by(2) else 1

    def one_row_ahead(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows that a stage of a pass has executed: with more than one rank, each after the stage's next row.

        An all-to-all that the stage starts for a row is then hidden behind compute of the next row. A single rank has
        no all-to-all to hide, and saves the memory.
        """
        return _one_ahead(rows) if self.overlaps_rows else rows

    @property
    def overlaps_rows(self) -> bool:
        """Whether a row is executed stage by stage, between the stages of other rows."""
        return self.parallel_state.sequence_parallel_group is not None

    def on_device(self, tensor: Tensor) -> Tensor:
        """Copy a small input (tokens, labels, positions of one chunk) to the compute device."""
        return tensor.to(self.store.device, non_blocking=True)

    def numbered_slices(self, x_cBh: Tensor) -> Iterator[tuple[int, slice]]:
        """Return the slices of a chunk's local tokens for token-wise work, numbered from 0."""
        starts = range(0, len(x_cBh), self.slice_length)
        return enumerate(slice(start, start + self.slice_length) for start in starts)


@lru_cache(maxsize=64)
def _layout(sequence_length: int, chunk_length: int, sequence_parallel_size: int) -> SequenceLayout:
    """Build a layout once, for all blocks and steps."""
    return SequenceLayout(sequence_length, min(chunk_length, sequence_length), sequence_parallel_size)


def _one_ahead(rows: Iterator[Row]) -> Iterator[Row]:
    ahead = deque(islice(rows, 1))
    while ahead:
        ahead.extend(islice(rows, 1))
        yield ahead.popleft()
