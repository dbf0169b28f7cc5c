"""What the streamed pieces of a model share: the store, the tiles' kernel, the ranks, and the length of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.parallel_state import ParallelState
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.store import ChunkStore
from megatron.ops.attention import AttentionBackend

BACKWARD_RUNS_ONCE = (
    "a streamed backward pass runs once: what the forward pass kept is gone, whatever retain_graph says"
)

# phase ("forward" or "backward"), layer number, chunk, number of chunks
ProgressReport = Callable[[str, int, int, int], None]


def no_report(phase: str, layer_number: int, chunk: int, num_chunks: int) -> None:
    """Report to nobody."""


@dataclass
class Stream:
    """How chunks are executed. `chunk_length` counts global tokens, `slice_length` this rank's.

    Token-wise work on a chunk runs in slices, so that the widest activation (the MLP's) is bounded apart from the
    chunk.
    """

    store: ChunkStore
    attention: AttentionBackend
    parallel_state: ParallelState
    chunk_length: int
    slice_length: int = 8192
    report: ProgressReport = no_report

    def layout(self, x_SBh: Tensor) -> SequenceLayout:
        """Layout of the sequence of which x holds this rank's tokens."""
        size = self.parallel_state.sequence_parallel_size
        sequence_length = x_SBh.shape[0] * size
        return SequenceLayout(sequence_length, min(self.chunk_length, sequence_length), size)

    def on_device(self, tensor: Tensor) -> Tensor:
        """A small input (tokens, labels, positions of one chunk) on the compute device."""
        return tensor.to(self.store.device, non_blocking=True)

    def slices(self, num_tokens: int) -> Iterator[slice]:
        """Slices of a chunk's local tokens for token-wise work."""
        return (slice(start, start + self.slice_length) for start in range(0, num_tokens, self.slice_length))


class GradientSum:
    """Sums of parameter gradients over chunks, in fp32 (fp64 for fp64 parameters)."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._dtypes = [p.dtype for p in parameters]
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one contribution per parameter; None where there is none."""
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[index]
            if total is None:
                self._sums[index] = gradient.to(accumulation_dtype(gradient.dtype), copy=True)
            else:
                total.add_(gradient)

    def result(self, scale: Tensor | None = None) -> list[Tensor | None]:
        """The sums in the dtypes of the parameters, times `scale` where it is given; the sums end here."""
        results: list[Tensor | None] = []
        for index, dtype in enumerate(self._dtypes):
            total, self._sums[index] = self._sums[index], None
            if total is not None and scale is not None:
                total.mul_(scale)
            results.append(None if total is None else total.to(dtype))
        return results


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
