"""How many bytes of the tier the chunks of a training step take up, and what is therefore kept of a block.

Per rank, for S/p of its own tokens, K' = lcm(K, p) key/value heads after replication and element size e:

    x         e S/p B h            input of every k-th block, and k-1 more while a chain of blocks is rebuilt
    o         e S/p B H D          every block
    lse       4 S/p B H            every block
    K, V      2 e S/p B K' D       every block, or the block in its backward pass, for which they are made anew
    products  of the layers that are not recomputed, every block:
                e S/p B (H + 2K) D  of the projection before attention
                e S'/p B h          of the projection after it, unless the MLP is beside it (a parallel residual)
                e S'/p B f          of the MLP's first layer, f outputs
              S' leaves out the first slice of each chunk
    dK, dV    8 S/p B K' D         the block in its backward pass
    dy, dx    e S/p B h each       that block too
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from megatron.config import SAVING_PRODUCTS, ModelConfig, Recompute
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.stream import SLICE_LENGTH

# FLOPs of an H100 or H200 while a byte goes to the host: 600e12 per second beside 50e9, and more than half to spare, as
# at 18,000 the copies of a block were seen to hold its arithmetic up (docs/performance.md).
_FLOPS_PER_BYTE = 20_000

# Of the budget, with products kept; the rest is left for whatever else the host has to hold.
_SHARE_WITH_PRODUCTS = 0.75


@dataclass(frozen=True)
class StreamShape:
    """What decides the size of the chunks of a model; widths in elements, slices in tokens of one rank."""

    num_layers: int
    hidden_size: int
    mlp_outputs: int  # of the MLP's first layer: twice its width where it is gated
    mlp_width: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    layout: SequenceLayout
    slice_length: int
    batch_size: int
    element_size: int
    parallel_residual: bool = False
    qk_layernorm: bool = False

    @classmethod
    def of(
        cls, model: ModelConfig, chunk_length: int, sequence_parallel_size: int, batch_size: int, element_size: int
    ) -> StreamShape:
        """The shape of a resolved model's chunks."""
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            mlp_outputs=model.ffn_hidden_size * (2 if model.swiglu else 1),
            mlp_width=model.ffn_hidden_size,
            num_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_size=model.kv_channels,
            layout=SequenceLayout(model.seq_length, min(chunk_length, model.seq_length), sequence_parallel_size),
            slice_length=SLICE_LENGTH,
            batch_size=batch_size,
            element_size=element_size,
            parallel_residual=model.parallel_residual,
            qk_layernorm=model.qk_layernorm,
        )

    @property
    def _local_tokens(self) -> int:
        return self.layout.local_length * self.batch_size

    @property
    def _sum_size(self) -> int:
        """Bytes of an element that is summed: fp32, or fp64 for fp64."""
        return max(self.element_size, 4)

    @property
    def residual_bytes(self) -> int:
        """x, dx or dy of one block."""
        return self._local_tokens * self.hidden_size * self.element_size

    @property
    def attention_bytes(self) -> int:
        """o and lse of one block."""
        return self._local_tokens * self.num_heads * (self.head_size * self.element_size + self._sum_size)

    @property
    def key_value_bytes(self) -> int:
        """K and V of one block."""
        return self.key_value_elements * self.element_size

    @property
    def _key_value_gradient_bytes(self) -> int:
        """dK and dV of one block."""
        return self.key_value_elements * self._sum_size

    def saved_bytes(self, recompute: Recompute) -> int:
        """What the backward pass finds of one block, its input aside."""
        keys_and_values = 0 if recompute == "kv" else self.key_value_bytes
        return self.attention_bytes + keys_and_values + self.product_bytes(recompute)

    @property
    def key_value_elements(self) -> int:
        """K and V of one block, or dK and dV."""
        heads = lcm(self.num_key_value_heads, self.layout.sequence_parallel_size)
        return self._local_tokens * 2 * heads * self.head_size

    def product_bytes(self, recompute: Recompute) -> int:
        """What linear layers of one block gave, as far as it is not recomputed."""
        if recompute not in SAVING_PRODUCTS:
            return 0
        return self._product_bytes(recompute, self.layout.local_length, self.layout.tokens_after(self.slice_length))

    def chunk_product_bytes(self, recompute: Recompute) -> int:
        """The same of its first chunk alone."""
        if recompute not in SAVING_PRODUCTS:
            return 0
        tokens = self.layout.local_lengths[0]
        return self._product_bytes(recompute, tokens, max(tokens - self.slice_length, 0))

    def _product_bytes(self, recompute: Recompute, tokens: int, tokens_kept_after: int) -> int:
        after = 0 if self.parallel_residual else self.hidden_size
        after += self.mlp_outputs if recompute == "none" else 0
        return (tokens * self.projection_width + tokens_kept_after * after) * self.batch_size * self.element_size

    def tier_bytes(self, interval: int, recompute: Recompute = "all") -> int:
        """Peak of a training step that keeps the input of every `interval`-th block, per rank."""
        layers = self.num_layers
        # The highest chain is rebuilt while all others are kept; the next may be longer by more than the highest had.
        tops = {layers, layers // interval * interval} - {0}
        backward = 2 * self.residual_bytes + self._key_value_gradient_bytes
        backward += self.key_value_bytes if recompute == "kv" else 0
        return max(self._bytes_up_to(top, interval, recompute) for top in tops) + backward

    def _bytes_up_to(self, top: int, interval: int, recompute: Recompute) -> int:
        """What is kept of the lowest `top` blocks when the inputs of their highest chain are rebuilt."""
        chains, rebuilt = -(-top // interval), (top - 1) % interval
        return top * self.saved_bytes(recompute) + (chains + rebuilt) * self.residual_bytes

    @property
    def largest_bytes(self) -> int:
        """The largest tensor of the tier."""
        return max(self.residual_bytes, self.attention_bytes, self._key_value_gradient_bytes)

    def sure_budget(self, host_bytes: int, device_bytes: int) -> int:
        """Bytes of chunks that find room in both, in whatever order they come.

        What is left of the device memory may be too little for the next tensor, as large as the largest.
        """
        return max(device_bytes, host_bytes + max(device_bytes - self.largest_bytes, 0))

    def overlaps_with_link(self, recompute: Recompute) -> bool:
        """Whether a block's forward pass takes longer than what it keeps takes to the host."""
        attention = 2 * self.layout.sequence_length * self.num_heads * self.head_size
        weights = self.projection_width + self.num_heads * self.head_size + self.mlp_outputs + self.mlp_width
        flops = self._local_tokens * (attention + 2 * self.hidden_size * weights)
        return flops >= _FLOPS_PER_BYTE * (self.residual_bytes + self.saved_bytes(recompute))

    @property
    def projection_width(self) -> int:
        """Outputs of the layer before attention."""
        return (self.num_heads + 2 * self.num_key_value_heads) * self.head_size


def choose_saved_activations(
    shape: StreamShape,
    budget_bytes: int,
    recompute: Recompute | None = None,
    interval: int | None = None,
) -> tuple[Recompute, int]:
    """(products recomputed, interval of the inputs kept): what costs the least time of what fits the budget.

    Those given stay as they are. Where nothing fits it is the lowest_memory.
    """
    intervals = range(1, shape.num_layers + 1) if interval is None else [interval]
    if recompute is not None:
        choices = [(recompute, each) for each in intervals]
    else:
        keeps_inputs = intervals[0] == 1
        products = [each for each in SAVING_PRODUCTS if keeps_inputs and _may_keep(shape, each, budget_bytes)]
        # Keys and values take much less time to make anew than inputs, for the bytes that it saves.
        choices = [*((each, 1) for each in products), ("all", intervals[0]), *(("kv", each) for each in intervals)]

    def num_bytes(choice: tuple[Recompute, int]) -> int:
        return shape.tier_bytes(choice[1], choice[0])

    fitting = (choice for choice in choices if num_bytes(choice) <= budget_bytes)
    return next(fitting, min(choices, key=num_bytes))


def lowest_memory(shape: StreamShape) -> tuple[Recompute, int]:
    """(products recomputed, interval of the inputs kept) of a step that keeps as little as it can."""
    return choose_saved_activations(shape, 0)


def least_bytes(shape: StreamShape) -> int:
    """Peak of a training step that keeps as little as it can, per rank."""
    recompute, interval = lowest_memory(shape)
    return shape.tier_bytes(interval, recompute)


def longest_sequence(shape: StreamShape, budget_bytes: int) -> int:
    """Tokens of the longest sequence whose lowest_memory execution fits the budget; 0 where none does."""
    layout, shortest = shape.layout, shape.layout.sequence_parallel_size

    def fits(num_tokens: int) -> bool:
        chunk_length = min(layout.chunk_length, num_tokens)
        at = replace(shape, layout=SequenceLayout(num_tokens, chunk_length, shortest))
        return least_bytes(at) <= budget_bytes

    low, high = 0, layout.sequence_length // shortest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * shortest) else (low, middle)
    return low * shortest


def _may_keep(shape: StreamShape, products: Recompute, budget_bytes: int) -> bool:
    fits = shape.tier_bytes(1, products) <= int(budget_bytes * _SHARE_WITH_PRODUCTS)
    return fits and shape.overlaps_with_link(products)
