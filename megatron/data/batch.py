"""Slicing of samples into one rank's batch: its slices of the sequence, in the order of its layout.

A rank reads the tokens of its slices and the one token after each, block by block, straight into its part of the batch.
It scans the whole sequence for document ends only if they matter, also block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.core.documents import Documents, Span
from megatron.core.sequence_layout import SequenceLayout
from megatron.data.tokens import Tokens, blocks

ModelInputs = tuple[Tensor, Tensor, Tensor, Tensor, Documents | None]
Positions = npt.NDArray[np.int64]
BatchProvider = Callable[[Sequence[Any]], "Batch"]  # from samples as the datasets return them


@dataclass(frozen=True)
class Sample:
    """S+1 tokens: inputs are the first S, labels the last S.

    `loss_spans` int64 [n, 2] are the ascending spans of the unmasked labels; None means all labels. `documents` are the
    spans of the S inputs that attend only to themselves and whose positions begin at 0. Tokens outside of them are
    padding.
    """

    tokens: Tokens
    loss_spans: npt.NDArray[np.int64] | None = None
    documents: tuple[Span, ...] | None = None

    @property
    def num_unmasked(self) -> int:
        """Number of unmasked labels."""
        if self.loss_spans is None:
            return len(self.tokens) - 1
        return int((self.loss_spans[:, 1] - self.loss_spans[:, 0]).sum())


@dataclass(frozen=True)
class EndOfDocument:
    """Effect of the end-of-document id on a sample; the fields are Megatron's flags of the same names."""

    token: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def sample(self, tokens: Tokens) -> Sample:
        """Make a sample of S+1 tokens, which are read only if a flag is set. The id belongs to the document it ends."""
        length, separates = len(tokens) - 1, self.reset_position_ids or self.reset_attention_mask
        if not (separates or self.eod_mask_loss):
            return Sample(tokens)
        ends = np.concatenate(
            [np.flatnonzero(tokens[start:stop] == self.token) + start for start, stop in blocks([(0, length)])]
        )
        starts = ends + 1
        loss_spans = np.stack((np.append(0, starts), np.append(ends, length)), axis=1)
        cuts = [0, *starts[starts < length].tolist(), length]
        return Sample(tokens, loss_spans if self.eod_mask_loss else None, tuple(pairwise(cuts)) if separates else None)


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank, [B, S/p] each, on the host: pinned if it will be copied to a GPU.

    `seq_length` is S, the tokens of each whole sequence.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    documents: Documents | None  # of the whole sequences; None: each is one document
    num_tokens: int  # unmasked tokens of the whole sequences, over all sequence-parallel ranks
    squared_lengths: int  # summed over the documents of the whole sequences: attention's work
    seq_length: int

    def inputs(self) -> ModelInputs:
        """Return the arguments of the model's forward pass."""
        return self.tokens, self.labels, self.loss_mask, self.positions, self.documents


def slice_batch(
    samples: Sequence[Sample],
    layout: SequenceLayout,
    sequence_parallel_rank: int,
    pin: bool,
    restart_positions: bool = True,
    separate_documents: bool = True,
) -> Batch:
    """Slice this rank's part of the samples; optionally restart positions and separate attention per document."""
    lengths = {len(sample.tokens) - 1 for sample in samples}
    if lengths != {layout.sequence_length}:
        raise ValueError(f"samples of {sorted(lengths)} tokens cannot share a batch of {layout.sequence_length}")
    spans, shape = layout.owned_spans(sequence_parallel_rank), (len(samples), layout.local_length)
    tokens_BS, labels_BS, mask_BS, positions_BS = (
        torch.empty(shape, dtype=dtype, pin_memory=pin)
        for dtype in (torch.int64, torch.int64, torch.float32, torch.int64)
    )
    for sample, *row in zip(samples, tokens_BS, labels_BS, mask_BS, positions_BS, strict=True):
        _fill(sample, spans, restart_positions, _Row(*(part.numpy() for part in row)))
    documents = _documents(samples, layout.sequence_length) if separate_documents else None
    return Batch(
        tokens_BS,
        labels_BS,
        mask_BS,
        positions_BS,
        documents,
        num_tokens=sum(sample.num_unmasked for sample in samples),
        squared_lengths=documents.squared_lengths if documents else len(samples) * layout.sequence_length**2,
        seq_length=layout.sequence_length,
    )


@dataclass(frozen=True)
class _Row:
    """One sample's row of a batch, [S/p] each."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]


def _fill(sample: Sample, spans: Sequence[Span], restart_positions: bool, row: _Row) -> None:
    """Write a sample's content at `spans`, one span after another, into its row."""
    starts = document_starts(sample.documents if restart_positions else None)
    end = 0
    for start, stop in blocks(spans):
        here = slice(end, end := end + stop - start)
        read, owned = sample.tokens[start : stop + 1], np.arange(start, stop)
        row.tokens[here], row.labels[here] = read[:-1], read[1:]
        row.loss_mask[here] = 1 if sample.loss_spans is None else _within(owned, sample.loss_spans)
        row.positions[here] = document_positions(owned, starts)


def _within(positions: Positions, spans: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mask the positions in one of the ascending spans [n, 2]: those with an odd number of bounds up to them."""
    return np.searchsorted(spans.ravel(), positions, side="right") % 2 == 1


def document_starts(documents: Sequence[Span] | None) -> Positions:
    """Return the start of each document; empty if the sequence is one document."""
    return np.array([start for start, _ in documents or ()], np.int64)


def document_positions(positions: Positions, starts: Positions) -> Positions:
    """Convert positions in the sequence to positions in their documents, which begin at `starts`."""
    if not len(starts):
        return positions
    return positions - starts[np.maximum(np.searchsorted(starts, positions, side="right") - 1, 0)].clip(max=positions)


def _documents(samples: Sequence[Sample], sequence_length: int) -> Documents | None:
    """Return the documents; None if every sample is one document that fills it."""
    whole = ((0, sequence_length),)
    spans = tuple(whole if sample.documents is None else sample.documents for sample in samples)
    return None if all(row == whole for row in spans) else Documents(spans)
