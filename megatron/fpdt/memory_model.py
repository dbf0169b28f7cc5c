"""How many bytes of the tier the chunks of a training step take up, and how often a block's input is kept.

Per rank, for S/p of its own tokens, K' = lcm(K, p) key/value heads after replication and element size e:

    x       e S/p B h            input of every k-th block, and k-1 more while a chain of blocks is rebuilt
    o       e S/p B H D          every block
    lse     4 S/p B H            every block
    K, V    2 e S/p B K' D       every block
    dK, dV  8 S/p B K' D         the block in its backward pass
    dy, dx  e S/p B h each       that block too
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm


@dataclass(frozen=True)
class StreamShape:
    """What decides the size of the chunks of a model; lengths in tokens of the whole sequence."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    sequence_length: int
    batch_size: int
    sequence_parallel_size: int
    element_size: int

    @property
    def _local_tokens(self) -> int:
        return self.sequence_length * self.batch_size // self.sequence_parallel_size

    @property
    def _sum_size(self) -> int:
        """Bytes of an element that is summed: fp32, or fp64 for fp64."""
        return max(self.element_size, 4)

    @property
    def residual_bytes(self) -> int:
        """x, dx or dy of one block."""
        return self._local_tokens * self.hidden_size * self.element_size

    @property
    def kept_bytes(self) -> int:
        """o, lse, K and V of one block."""
        o = self.num_heads * self.head_size * self.element_size
        lse = self.num_heads * self._sum_size
        return self._local_tokens * (o + lse) + self.key_value_elements * self.element_size

    @property
    def key_value_elements(self) -> int:
        """K and V of one block, or dK and dV."""
        heads = lcm(self.num_key_value_heads, self.sequence_parallel_size)
        return self._local_tokens * 2 * heads * self.head_size

    def tier_bytes(self, interval: int) -> int:
        """Peak of a training step that keeps the input of every `interval`-th block, per rank."""
        chains = -(-self.num_layers // interval)
        # The highest chain is rebuilt while all others are still kept.
        rebuilt = (self.num_layers - 1) % interval
        backward = (chains + rebuilt + 2) * self.residual_bytes + self.key_value_elements * self._sum_size
        return self.num_layers * self.kept_bytes + backward


def choose_checkpoint_interval(shape: StreamShape, budget_bytes: int) -> int:
    """The smallest interval that fits the budget, as a longer one costs time; the thriftiest where none does."""
    intervals = range(1, shape.num_layers + 1)
    fitting = (interval for interval in intervals if shape.tier_bytes(interval) <= budget_bytes)
    return next(fitting, min(intervals, key=shape.tier_bytes))
