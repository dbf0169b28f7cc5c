"""Mean token loss by position in the context, which shows whether later tokens profit from a longer context.

Token losses are summed by bucket of position on the device, in addition to the loss itself, so the buckets' sums add up
to the sum that the evaluation reports. Where documents do not see each other, a token's position is its position in
its document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.logging import LoggingConfig
from megatron.data.batch import Batch, document_positions, document_starts
from megatron.fpdt.observer import Observer
from megatron.fpdt.stream import Stream
from megatron.logging.log_line import Bucket


def bucket_edges(logging: LoggingConfig, seq_length: int) -> list[int]:
    """Return the first position of each bucket, and one past the last; [] without --log-loss-by-position."""
    count = logging.loss_position_buckets
    if logging.log_loss_by_position is None:
        return []
    if logging.log_loss_by_position == "equal":
        return sorted({seq_length * i // count for i in range(count + 1)})
    return sorted({0, *(seq_length >> halvings for halvings in range(count))})


class TokenLosses(Observer):
    """Collects the token losses of an evaluation while asked to."""

    def __init__(self) -> None:
        self._losses: list[Tensor] | None = None

    def note_token_losses(self, losses: Tensor) -> None:
        if self._losses is not None:
            self._losses.append(losses)

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Collect in the list that is yielded, within this context."""
        losses: list[Tensor] = []
        self._losses = losses
        try:
            yield losses
        finally:
            self._losses = None


class LossByPosition:
    """Token losses of this rank by bucket, summed over one evaluation. Without buckets it changes nothing."""

    def __init__(self, edges: list[int], seq_length: int, stream: Stream, token_losses: TokenLosses) -> None:
        """Take `token_losses`, which observes the stream."""
        self._edges, self._token_losses = edges, token_losses
        rank, device = stream.parallel_state.sequence_parallel_rank, stream.store.device
        self._owned = stream.layout_of(seq_length).owned_positions(rank)
        # For each bucket: the sum of token losses, and the sum of the loss mask.
        self._sums = torch.zeros(2, max(len(edges) - 1, 0), dtype=torch.float64, device=device)

    def evaluate(self, batch: Batch, evaluate: Callable[[Any], Tensor]) -> Tensor:
        """Return the loss sum of the batch from `evaluate`; add its token losses to their buckets."""
        if not self._edges:
            return evaluate(batch.inputs())
        with self._token_losses.collecting() as token_losses:
            loss = evaluate(batch.inputs())
        buckets_BS = torch.bucketize(self._positions(batch), torch.tensor(self._edges[1:-1]), right=True)
        buckets = buckets_BS.T.flatten().to(self._sums.device)  # [B, S/p] -> [S/p * B], as the losses are
        for sums, values in zip(self._sums, (torch.cat(token_losses), batch.loss_mask.T.flatten()), strict=True):
            sums.index_add_(0, buckets, values.to(sums))
        return loss

    def _positions(self, batch: Batch) -> Tensor:
        """Return the position of each token in the context that it sees, int64 [B, S/p]."""
        if batch.documents is None:
            return self._owned.repeat(len(batch.tokens), 1)
        owned = self._owned.numpy()
        rows = (document_positions(owned, document_starts(row)) for row in batch.documents.spans)
        return torch.stack([torch.from_numpy(row) for row in rows])

    def buckets(self) -> list[Bucket]:
        """Return the buckets that have tokens, summed over all ranks. Collective over them; waits for the device."""
        if not self._edges:
            return []
        dist.all_reduce(self._sums)
        losses, weights = self._sums.tolist()
        rows = zip(self._edges, self._edges[1:], losses, weights, strict=False)
        return [Bucket(first, end, loss / weight, weight) for first, end, loss, weight in rows if weight]
