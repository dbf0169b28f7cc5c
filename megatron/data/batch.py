"""From a sample to what one rank computes on: its slices of the sequence, in the order of its layout.

A rank reads the tokens of its slices and the one after each, a block at a time, straight into its part of the batch.
Only where ends of documents matter does it look through the whole sequence for them, again a block at a time.
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
BatchProvider = Callable[[Sequence[Any]], "Batch"]  # from samples as the datasets give them


@dataclass(frozen=True)
class Sample:
    """S+1 tokens: inputs are the first S, labels the last S.

    `loss_spans` int64 [n, 2] are the spans of the labels that count, ascending; all count without it. `documents` are
    the spans of the S inputs that see themselves alone, and where positions begin at 0; what is in none of them is
    padding.
    """

    tokens: Tokens
    loss_spans: npt.NDArray[np.int64] | None = None
    documents: tuple[Span, ...] | None = None

    @property
    def num_unmasked(self) -> int:
        """Labels that count."""
        if self.loss_spans is None:
            return len(self.tokens) - 1
        return int((self.loss_spans[:, 1] - self.loss_spans[:, 0]).sum())


@dataclass(frozen=True)
class EndOfDocument:
    """What the id that ends a document does to a sample; Megatron's flags of these names."""

    token: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def sample(self, tokens: Tokens) -> Sample:
        """The sample of S+1 tokens; the id belongs to the document that it ends. Reads them only with a flag."""
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
    """One micro-batch on one rank, [B, S/p] each, on the host: pinned where it will be copied to a GPU."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    documents: Documents | None  # of the whole sequences; None: each is one
    num_tokens: int  # unmasked tokens of the whole sequences, over all sequence-parallel ranks
    squared_lengths: int  # of the documents of the whole sequences, summed: attention's work

    def inputs(self) -> ModelInputs:
        """Arguments of the model's forward pass."""
        return self.tokens, self.labels, self.loss_mask, self.positions, self.documents


def slice_batch(
    samples: Sequence[Sample],
    layout: SequenceLayout,
    sequence_parallel_rank: int,
    pin: bool,
    restart_positions: bool = True,
    separate_documents: bool = True,
) -> Batch:
    """This rank's part of samples. Of their documents, positions begin at 0 and attention stays within if so asked."""
    spans, shape = layout.owned_spans(sequence_parallel_rank), (len(samples), layout.local_length)
    tokens_BS, labels_BS, mask_BS, positions_BS = (
        torch.empty(shape, dtype=dtype, pin_memory=pin)
        for dtype in (torch.int64, torch.int64, torch.float32, torch.int64)
    )
    for sample, *row in zip(samples, tokens_BS, labels_BS, mask_BS, positions_BS, strict=True):
        _fill(sample, spans, restart_positions, *(part.numpy() for part in row))
    documents = _documents(samples, layout.sequence_length) if separate_documents else None
    return Batch(
        tokens_BS,
        labels_BS,
        mask_BS,
        positions_BS,
        documents,
        num_tokens=sum(sample.num_unmasked for sample in samples),
        squared_lengths=documents.squared_lengths if documents else len(samples) * layout.sequence_length**2,
    )


def _fill(
    sample: Sample,
    spans: Sequence[Span],
    restart_positions: bool,
    tokens: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    loss_mask: npt.NDArray[np.float32],
    positions: npt.NDArray[np.int64],
) -> None:
    """Write what a sample has at `spans`, one after the other, into the arrays [S/p]."""
    starts = document_starts(sample.documents if restart_positions else None)
    end = 0
    for start, stop in blocks(spans):
        here = slice(end, end := end + stop - start)
        read, owned = sample.tokens[start : stop + 1], np.arange(start, stop)
        tokens[here], labels[here] = read[:-1], read[1:]
        loss_mask[here] = 1 if sample.loss_spans is None else _within(owned, sample.loss_spans)
        positions[here] = document_positions(owned, starts)


def _within(positions: Positions, spans: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which positions lie in one of the spans [n, 2], ascending: those with an odd number of bounds up to them."""
    return np.searchsorted(spans.ravel(), positions, side="right") % 2 == 1


def document_starts(documents: Sequence[Span] | None) -> Positions:
    """Where each document begins; nowhere if there are none, the sequence being one."""
    return np.array([start for start, _ in documents or ()], np.int64)


def document_positions(positions: Positions, starts: Positions) -> Positions:
    """Positions in the document, of which those of the sequence are given, and where its documents begin."""
    if not len(starts):
        return positions
    return positions - starts[np.maximum(np.searchsorted(starts, positions, side="right") - 1, 0)].clip(max=positions)


def _documents(samples: Sequence[Sample], sequence_length: int) -> Documents | None:
    """None where no sample has more than one, which fills it."""
    whole = ((0, sequence_length),)
    spans = tuple(whole if sample.documents is None else sample.documents for sample in samples)
    return None if all(row == whole for row in spans) else Documents(spans)
