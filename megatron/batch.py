"""From a sample to what one rank computes on: its slices of the sequence, in the order of its layout."""

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

ModelInputs = tuple[Tensor, Tensor, Tensor, Tensor, Documents | None]


@dataclass(frozen=True)
class Sample:
    """S+1 tokens: inputs are the first S, labels the last S.

    `loss_mask` [S] says which labels count, all without it. `documents` are the spans of the S inputs that see
    themselves alone, and where positions begin at 0; what is in none of them is padding.
    """

    tokens: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_] | None = None
    documents: tuple[Span, ...] | None = None


Tokens = npt.NDArray[np.int64]
BatchProvider = Callable[[Sequence[Any]], "Batch"]  # from samples as the datasets give them


@dataclass(frozen=True)
class EndOfDocument:
    """What the id that ends a document does to a sample; Megatron's flags of these names."""

    token: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def sample(self, tokens: Tokens) -> Sample:
        """The sample of S+1 tokens; the id belongs to the document that it ends."""
        inputs = tokens[:-1]
        mask = inputs != self.token if self.eod_mask_loss else None
        if not (self.reset_position_ids or self.reset_attention_mask):
            return Sample(tokens, mask)
        ends = (np.flatnonzero(inputs == self.token) + 1).tolist()
        cuts = [0, *(end for end in ends if end < len(inputs)), len(inputs)]
        return Sample(tokens, mask, tuple(pairwise(cuts)))


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
    owned = layout.owned_positions(sequence_parallel_rank).numpy()
    tokens = np.stack([sample.tokens[owned] for sample in samples])
    labels = np.stack([sample.tokens[owned + 1] for sample in samples])
    masks = [np.ones(len(owned), bool) if s.loss_mask is None else s.loss_mask[owned] for s in samples]
    positions = [document_positions(owned, sample.documents if restart_positions else None) for sample in samples]
    parts = map(torch.from_numpy, (tokens, labels, np.stack(masks).astype(np.float32), np.stack(positions)))
    tokens_BS, labels_BS, mask_BS, positions_BS = (part.pin_memory() if pin else part for part in parts)
    documents = _documents(samples, layout.sequence_length) if separate_documents else None
    return Batch(
        tokens_BS,
        labels_BS,
        mask_BS,
        positions_BS,
        documents,
        num_tokens=sum(_num_unmasked(sample) for sample in samples),
        squared_lengths=documents.squared_lengths if documents else len(samples) * layout.sequence_length**2,
    )


def document_positions(owned: npt.NDArray[np.int64], documents: tuple[Span, ...] | None) -> npt.NDArray[np.int64]:
    """Positions in the document of the tokens at the positions `owned` of the sequence, which is one without any."""
    if not documents:
        return owned
    starts = np.array([start for start, _ in documents])
    return owned - starts[np.maximum(np.searchsorted(starts, owned, side="right") - 1, 0)].clip(max=owned)


def _documents(samples: Sequence[Sample], sequence_length: int) -> Documents | None:
    """None where no sample has more than one, which fills it."""
    whole = ((0, sequence_length),)
    spans = tuple(whole if sample.documents is None else sample.documents for sample in samples)
    return None if all(row == whole for row in spans) else Documents(spans)


def _num_unmasked(sample: Sample) -> int:
    return len(sample.tokens) - 1 if sample.loss_mask is None else int(sample.loss_mask.sum())
