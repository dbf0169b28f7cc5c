"""From a sample to what one rank computes on: its slices of the sequence, in the order of its layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.core.sequence_layout import SequenceLayout

Samples = Sequence[npt.NDArray[np.int64]]
BatchProvider = Callable[[Samples], "Batch"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank, [B, S/p] each, on the host: pinned where it will be copied to a GPU."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    num_tokens: int  # unmasked tokens of the whole sequences, over all sequence-parallel ranks

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the model's forward pass."""
        return self.tokens, self.labels, self.loss_mask, self.positions


def slice_batch(samples: Samples, layout: SequenceLayout, sequence_parallel_rank: int, pin: bool) -> Batch:
    """This rank's part of samples of S+1 tokens each: inputs are the first S tokens, labels the last S."""
    owned = layout.owned_positions(sequence_parallel_rank)
    sequences = torch.from_numpy(np.stack(list(samples)))
    tokens, labels = sequences[:, :-1][:, owned], sequences[:, 1:][:, owned]
    mask = torch.ones(tokens.shape, dtype=torch.float32)
    positions = owned.expand(tokens.shape).contiguous()
    if pin:
        tokens, labels, mask, positions = (t.pin_memory() for t in (tokens, labels, mask, positions))
    return Batch(tokens, labels, mask, positions, num_tokens=sequences.shape[0] * (sequences.shape[1] - 1))
