"""Outputs of linear layers, kept on the tier by a block's forward pass so that its backward pass need not repeat them.

The layers of which outputs are kept are named by their weights. A call of `before` or of `after` runs inside `kept`;
when it is run again for its gradients, inside `given`, the same layers take their outputs from there instead of
computing them. What is kept counts and travels like every other chunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from megatron.fpdt.store import ChunkStore


class Products:
    """What the layers of some weights gave, call by call; with no weights, nothing."""

    def __init__(self, store: ChunkStore, weights: Sequence[nn.Parameter]) -> None:
        self._store = store
        self._weights = weights
        self._calls: defaultdict[int, list[Sequence[Tensor]]] = defaultdict(list)  # by chunk

    @contextmanager
    def kept(self, chunk: int) -> Iterator[None]:
        """Keep what the layers give within: one call more for the chunk."""
        outputs: list[Tensor] = []
        with self.given(outputs):
            yield
        self._calls[chunk].append([self._store.keep(output) for output in outputs])

    def calls(self, chunk: int) -> Sequence[Sequence[Tensor]]:
        """What was kept of each call for the chunk."""
        return self._calls[chunk]

    @contextmanager
    def given(self, outputs: list[Tensor]) -> Iterator[None]:
        """Hang `outputs` on each weight, where `megatron.ops.linear` looks for them."""
        for weight in self._weights:
            weight.outputs = outputs  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for weight in self._weights:
                del weight.outputs  # type: ignore[attr-defined]
