"""What the forward pass of a streamed block saves for its backward pass: chunks on the tier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

    @property
    def has_attention(self) -> bool:
        """Whether o and lse are saved, or recomputed by now."""
        return bool(self.o_cBHD)
