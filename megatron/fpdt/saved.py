"""What the forward pass of a streamed block saves for its backward pass: chunks on the tier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from megatron.fpdt.layer_trace import LayerTrace
from megatron.fpdt.plan import ChunkPlan
from megatron.fpdt.random_state import RandomStates

# By chunk, by slice: outputs of linear products, in the order of LayerTrace.saved_before or saved_after. Those after
# attention are saved for the first slice only if they stay on the device: to prefetch them would take its memory while
# tiles run.
Products = defaultdict[int, list[list[Tensor]]]


@dataclass(frozen=True)
class Saved:
    """What one block saves. C tokens of a chunk, c of them this rank's; K keys and K values of this rank's heads."""

    plan: ChunkPlan
    trace: LayerTrace
    positions_BS: Tensor
    random_states: RandomStates
    products_before: Products  # of the attention call
    products_after: Products
    o_cBHD: Sequence[Tensor]  # this rank's tokens, all heads; none if attention is recomputed
    lse_BHC: Sequence[Tensor]  # this rank's heads, and its rows of the chunk
    kv_CBKD: Mapping[int, Tensor] | None  # of the chunks that tiles load, all tokens, this rank's heads; or recomputed

    def loads(self, xs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the chunks that the backward pass loads of what is saved and of the input, if it is there, in order."""
        if xs and self.kv_CBKD is None:
            yield from (xs[i] for i in self.plan.loaded_keys())
        for row in self.plan.backward_rows():
            i = row[0].query
            yield from (chunks[i] for chunks in (xs, self.o_cBHD, self.lse_BHC) if chunks)
            yield from chain(*self.products_after[i][1:], *self.products_before[i])

    @property
    def has_attention(self) -> bool:
        """Whether o and lse are saved, or recomputed by now."""
        return bool(self.o_cBHD)
