"""Estimate of the bytes that a training step offloads, and the choice of what each block saves for backward.

Per rank, for S/p of its own tokens and element size e. H' and K' are p times the query and key/value heads of the
largest rank, rows shared and copies counted; H and lcm(K, p) where p divides H (megatron.core.head_layout):

    x         e S/p B h            input of every k-th block, and k-1 more while the inputs of a chain are rebuilt
    o         e S/p B H D          every block, or those of the chain in its backward pass, if attention is recomputed:
    lse       4 S/p B H'             together with k of them k/2 inputs of a chain, rounded down, are there at most
    K, V      2 e S1/p B K' D      every block, or only the block in its backward pass, if they are recomputed;
                                   S1 leaves out the last chunk, which only its own row reads
    products  outputs of linear layers that are not recomputed, every block:
                e S/p B (H + 2K) D  of the projection before attention; of all products there, if there are more
                e S'/p B h          of the projection after it, except with a parallel residual
                e S'/p B f          of the MLP's first layer, f outputs; none of experts
              S' leaves out the first slice of each chunk, whose products are saved only if they stay on the device
    dK, dV    8 S2/p B K' D        the block in its backward pass; S2 leaves out the last two chunks, whose sums stay on
                                   the device
    dy, dx    e S/p B h each       the block in its backward pass
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron.config import ModelConfig, Recompute
from megatron.core.head_layout import HeadLayout
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.device_budget import ChunkKind, DeviceBudget
from megatron.fpdt.disk_budget import HostAndDisk, divide, least_host_bytes
from megatron.fpdt.stream import SLICE_LENGTH

# Compute over copies from which copies do not stall compute: they come in bursts. With 1.5 they were seen to.
_OVERLAP_MARGIN = 1.7

# Share of the host memory that may be used if products are saved; the rest is left for its other uses.
_SHARE_WITH_PRODUCTS = 0.75


@dataclass(frozen=True)
class TierBudget:
    """Bytes of chunks that may be stored per rank, on the host, on the device, and on a disk behind the host."""

    host_bytes: int
    device_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class FlopsPerByte:
    """FLOPs that a GPU computes while its link copies a byte: to the host alone, or while both directions are busy."""

    to_host: float
    both_ways: float


HOPPER_ALONE = FlopsPerByte(600e12 / 52e9, 600e12 / 82e9)  # one H100 or H200 at work in its machine


@dataclass(frozen=True)
class StreamShape:
    """The sizes that determine the bytes of a model's chunks; widths in elements, slices in tokens of one rank."""

    num_layers: int
    hidden_size: int
    projection_width: int  # outputs of the products before attention
    saved_mlp_outputs: int  # of the MLP's first layer
    mlp_outputs: int  # the same with those of experts, which are not saved
    mlp_width: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    layout: SequenceLayout
    slice_length: int
    batch_size: int
    element_size: int
    block_weights: int  # that a token meets, mean of the blocks
    attention_share: float = 1.0  # of causal attention that windows leave, mean of the blocks
    saves_output: bool = True  # of attention's output projection
    normalizes_products: bool = False  # before attention

    @classmethod
    def of(
        cls, model: ModelConfig, chunk_length: int, sequence_parallel_size: int, batch_size: int, element_size: int
    ) -> StreamShape:
        """Build the shape from a resolved model configuration."""
        sizes = model.sizes
        saved, outputs = (sizes.adapters.saved_outputs, sizes.adapters.outputs) if sizes.adapters else (0, 0)
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            projection_width=sizes.projection_width + saved,
            saved_mlp_outputs=sizes.saved_mlp_outputs + saved,
            mlp_outputs=sizes.mlp_outputs + outputs,
            mlp_width=sizes.mlp_width,
            num_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_size=model.kv_channels,
            layout=SequenceLayout(model.seq_length, min(chunk_length, model.seq_length), sequence_parallel_size),
            slice_length=SLICE_LENGTH,
            batch_size=batch_size,
            element_size=element_size,
            block_weights=sizes.token_weights.total // model.num_layers,
            attention_share=sizes.attention_share(model.seq_length),
            saves_output=sizes.saves_output,
            normalizes_products=sizes.normalizes_products,
        )

    @cached_property
    def heads(self) -> HeadLayout:
        """The heads over the ranks."""
        return HeadLayout(self.num_heads, self.num_key_value_heads, self.layout.sequence_parallel_size)

    @cached_property
    def _local_tokens(self) -> int:
        return self.layout.local_length * self.batch_size

    @property
    def _sum_size(self) -> int:
        """Bytes of an element of an accumulated tensor: fp32, or fp64 for fp64."""
        return max(self.element_size, 4)

    @cached_property
    def residual_bytes(self) -> int:
        """Bytes of x, dx or dy of one block."""
        return self._local_tokens * self.hidden_size * self.element_size

    @cached_property
    def attention_chunks(self) -> tuple[int, ...]:
        """Bytes of o and of lse of each chunk of one block, as they are stored."""
        o, lse = self.num_heads * self.head_size * self.element_size, self.heads.largest_num_heads * self._sum_size
        lengths = self.layout.local_lengths
        return tuple(tokens * self.batch_size * size for tokens in lengths for size in (o, lse))

    @cached_property
    def key_value_chunks(self) -> tuple[int, ...]:
        """Bytes of K and V of each chunk of one block that is stored: the last is read by its own row only."""
        return tuple(n * self.element_size for n in self._key_value_elements[:-1])

    @cached_property
    def key_value_gradient_chunks(self) -> tuple[int, ...]:
        """Bytes of dK and dV of each chunk of one block that is stored: the last two stay where they are computed."""
        return tuple(n * self._sum_size for n in self._key_value_elements[:-2])

    @cached_property
    def attention_bytes(self) -> int:
        """Bytes of o and lse of one block."""
        return sum(self.attention_chunks)

    @cached_property
    def key_value_bytes(self) -> int:
        """Bytes of K and V of one block that are stored."""
        return sum(self.key_value_chunks)

    @cached_property
    def key_value_gradient_bytes(self) -> int:
        """Bytes of dK and dV of one block that are stored."""
        return sum(self.key_value_gradient_chunks)

    def saved_bytes(self, recompute: Recompute) -> int:
        """Return the bytes that one block saves for backward, without its input."""
        attention = self.attention_bytes if recompute.saves_attention else 0
        keys_and_values = self.key_value_bytes if recompute.saves_keys_and_values else 0
        return attention + keys_and_values + self.product_bytes(recompute)

    @property
    def key_value_elements(self) -> int:
        """Elements of K and V of one block, or of dK and dV."""
        return sum(self._key_value_elements)

    @property
    def _key_value_elements(self) -> list[int]:
        """Elements of K and V of each chunk."""
        heads = self.heads.largest_num_key_value_heads
        return [tokens * self.batch_size * 2 * heads * self.head_size for tokens in self.layout.local_lengths]

    def product_bytes(self, recompute: Recompute) -> int:
        """Return the bytes of the saved outputs of linear layers of one block."""
        if not recompute.saves_products:
            return 0
        return self._product_bytes(recompute, self.layout.local_length, self.layout.tokens_after(self.slice_length))

    def first_product_chunks(self, recompute: Recompute) -> tuple[int, ...]:
        """Bytes of the outputs of linear layers after attention of the first slice of each chunk of one block."""
        if not recompute.saves_products:
            return ()
        lengths = (min(length, self.slice_length) for length in self.layout.local_lengths)
        return tuple(self._product_bytes(recompute, 0, length) for length in lengths)

    def chunk_product_bytes(self, recompute: Recompute) -> int:
        """Return the bytes of the saved outputs of linear layers of one block's first chunk."""
        if not recompute.saves_products:
            return 0
        tokens = self.layout.local_lengths[0]
        return self._product_bytes(recompute, tokens, max(tokens - self.slice_length, 0))

    def last_slice_product_bytes(self, recompute: Recompute) -> int:
        """Return the bytes of the saved outputs after attention of a chunk's last slice, the last to be computed."""
        if not recompute.saves_products or self.layout.local_lengths[0] <= self.slice_length:
            return 0
        return self._product_bytes(recompute, 0, (self.layout.local_lengths[0] - 1) % self.slice_length + 1)

    def _product_bytes(self, recompute: Recompute, tokens: int, tokens_saved_after: int) -> int:
        after = self.hidden_size if self.saves_output else 0
        after += self.saved_mlp_outputs if recompute.saves_mlp_products else 0
        return (tokens * self.projection_width + tokens_saved_after * after) * self.batch_size * self.element_size

    def tier_bytes(self, interval: int, recompute: Recompute = Recompute.ALL) -> int:
        """Estimate the peak bytes per rank of a training step that saves the input of every `interval`-th block."""
        return sum(self.kind_bytes(interval, recompute).values())

    def kind_bytes(self, interval: int, recompute: Recompute) -> dict[ChunkKind, int]:
        """Estimate the bytes of each kind at the peak of `tier_bytes`, the kind that gains most on the device first."""
        return max(self._peaks(interval, recompute), key=lambda kinds: sum(kinds.values()))

    def _peaks(self, interval: int, recompute: Recompute) -> list[dict[ChunkKind, int]]:
        """Return the bytes of each kind at the moments of a step that may be its peak."""
        layers = self.num_layers
        # The peak is reached while the highest chain is rebuilt and all others are saved, or while the next chain is
        # rebuilt, if that is longer by more than what the highest chain had saved.
        tops = {layers, layers // interval * interval} - {0}
        return [self._kind_bytes_up_to(top, interval, recompute) for top in sorted(tops)]

    def _kind_bytes_up_to(self, top: int, interval: int, recompute: Recompute) -> dict[ChunkKind, int]:
        """Return the bytes of the lowest `top` blocks, the highest in its backward pass and its chain rebuilt."""
        chains, rebuilt = -(-top // interval), (top - 1) % interval
        with_attention = top
        if not recompute.saves_attention:
            with_attention = rebuilt + 1
            rebuilt = with_attention // 2
        return {
            ChunkKind.KEY_VALUE_GRADIENTS: self.key_value_gradient_bytes,
            ChunkKind.KEYS_VALUES: self.key_value_bytes * (top if recompute.saves_keys_and_values else 1),
            ChunkKind.ATTENTION_OUTPUTS: self.attention_bytes * with_attention,
            ChunkKind.PRODUCTS: self.product_bytes(recompute) * top,
            ChunkKind.HIDDEN_GRADIENTS: self.residual_bytes * 2,
            ChunkKind.HIDDEN_STATES: self.residual_bytes * (chains + rebuilt),
        }

    def device_budget(self, device_bytes: int, interval: int, recompute: Recompute) -> DeviceBudget:
        """Share out device memory to the kinds, those first that gain most."""
        reserved = self.kind_bytes(interval, recompute)
        reserved[ChunkKind.HIDDEN_STATES] += self.residual_bytes  # alive while the loss is computed
        first_products = self.num_layers * sum(self.first_product_chunks(recompute))
        room = max(device_bytes - sum(reserved.values()), 0)
        return DeviceBudget(device_bytes, reserved, min(room / first_products, 1.0) if first_products else 0.0)

    def device_bytes(self, available: int, interval: int, recompute: Recompute) -> dict[ChunkKind, int]:
        """Return the bytes of each kind that are sure to be stored on a device with so many bytes for chunks.

        The rest of the memory may be too small for the next tensor. Hidden states are stored there last, and one more
        than `kind_bytes` counts is alive while the loss is computed.
        """
        product = (
            max(self.projection_width, self.saved_mlp_outputs) * self.slice_length * self.batch_size * self.element_size
        )
        unit = {
            ChunkKind.KEY_VALUE_GRADIENTS: max(self.key_value_gradient_chunks, default=0),
            ChunkKind.KEYS_VALUES: max(self.key_value_chunks, default=0),
            ChunkKind.ATTENTION_OUTPUTS: max(self.attention_chunks),
            ChunkKind.PRODUCTS: product,
            ChunkKind.HIDDEN_GRADIENTS: 0,
            ChunkKind.HIDDEN_STATES: self.residual_bytes,
        }
        stored = {}
        for kind, needed in self.kind_bytes(interval, recompute).items():
            stored[kind] = needed if needed <= available else max(available - unit[kind], 0)
            available -= min(needed, available)
        if available < self.residual_bytes:
            stored[ChunkKind.HIDDEN_GRADIENTS] = 0
            stored[ChunkKind.HIDDEN_STATES] = max(stored[ChunkKind.HIDDEN_STATES] - self.residual_bytes, 0)
        return stored

    def host_bytes(self, device_bytes: int, interval: int, recompute: Recompute) -> int:
        """Estimate the peak bytes on the host, with so many bytes for chunks on the device."""
        return sum(self._offloaded_bytes(device_bytes, interval, recompute).values())

    def on_host_and_disk(self, budget: TierBudget, interval: int, recompute: Recompute) -> HostAndDisk | None:
        """Divide the offloaded chunks between host and disk; None where the budget is too small, or has no disk."""
        if not budget.disk_bytes:
            return None
        needed = self._offloaded_bytes(budget.device_bytes, interval, recompute)
        # The input of the block below, of which all is read before its first row; and two rows.
        row = (self.residual_bytes + self.attention_bytes + self.product_bytes(recompute)) // self.layout.num_chunks
        divided = divide(needed, budget.host_bytes, self.residual_bytes + 2 * row, self.residual_bytes)
        return divided if divided is not None and divided.file_bytes <= budget.disk_bytes else None

    def least_host_bytes_with_disk(self, device_bytes: int) -> int:
        """Return the host memory without which a disk is of no use."""
        return least_host_bytes(self._offloaded_bytes(device_bytes, 1, Recompute.KV))

    def _offloaded_bytes(self, device_bytes: int, interval: int, recompute: Recompute) -> dict[ChunkKind, int]:
        """Return the bytes of each kind beyond what the device stores, at the peak of their sum."""
        stored, peaks = self.device_bytes(device_bytes, interval, recompute), self._peaks(interval, recompute)
        offloaded = [{kind: max(n - stored[kind], 0) for kind, n in kinds.items()} for kinds in peaks]
        return max(offloaded, key=lambda kinds: sum(kinds.values()))

    def fits(self, budget: TierBudget, interval: int, recompute: Recompute) -> bool:
        """Whether the chunks of a step fit the host, or the host and the disk."""
        on_host = self.host_bytes(budget.device_bytes, interval, recompute)
        return on_host <= budget.host_bytes or self.on_host_and_disk(budget, interval, recompute) is not None

    def overlaps_with_link(
        self, recompute: Recompute, flops_per_byte: FlopsPerByte = HOPPER_ALONE, host_share: float = 1.0
    ) -> bool:
        """Whether a block's forward pass takes longer than the copies of its chunks on the host, which are then hidden.

        `host_share` of the chunks is stored there.
        """
        attention = 2 * self.layout.sequence_length * self.attention_share * self.num_heads * self.head_size
        flops = self._local_tokens * (attention + 2 * self.block_weights)
        loads = self.layout.num_chunks / 2  # of each stored chunk of keys and values
        bytes_in = self.residual_bytes + loads * self.key_value_bytes
        bytes_out = self.residual_bytes + self.saved_bytes(recompute)
        in_copies = max(flops_per_byte.to_host * bytes_out, flops_per_byte.both_ways * (bytes_in + bytes_out))
        return flops >= _OVERLAP_MARGIN * host_share * in_copies


def choose_saved_activations(
    shape: StreamShape,
    budget: TierBudget,
    recompute: Recompute | None = None,
    interval: int | None = None,
    flops_per_byte: FlopsPerByte = HOPPER_ALONE,
) -> tuple[Recompute, int]:
    """Choose (products recomputed, interval of the saved inputs): the fastest choice that fits the budget.

    A given value is kept as it is. If nothing fits, return the choice with the lowest memory.
    """
    intervals = range(1, shape.num_layers + 1) if interval is None else [interval]
    if recompute is not None:
        choices = [(recompute, each) for each in intervals]
    else:
        saves_inputs = intervals[0] == 1
        saving = (Recompute.NONE, Recompute.MLP)
        products = [each for each in saving if saves_inputs and _may_save(shape, each, budget, flops_per_byte)]
        # For the bytes saved, recomputing keys and values takes much less time than rebuilding inputs.
        choices = [(each, 1) for each in products]
        choices += [(Recompute.ALL, intervals[0])]
        choices += [(each, k) for each in (Recompute.KV, Recompute.ATTENTION) for k in intervals]

    needed: dict[tuple[Recompute, int], int] = {}
    for choice in choices:
        needed[choice] = shape.host_bytes(budget.device_bytes, choice[1], choice[0])
        if needed[choice] <= budget.host_bytes and (choice[0].saves_attention or not budget.disk_bytes):
            return choice
    if budget.disk_bytes:
        # A disk is faster than recomputing attention. Saved keys and values would use the host memory that leaves the
        # disk with little to do.
        lean = [choice for choice in choices if choice[0] is Recompute.KV]
        with_disk = next((choice for choice in [*lean, *choices] if shape.fits(budget, choice[1], choice[0])), None)
        if with_disk is not None:
            return with_disk
    return min(needed, key=lambda choice: needed[choice])


def saving_order(recompute: Recompute, interval: int) -> tuple[int, int]:
    """Return what orders choices by how much they save for backward, the least first."""
    return list(Recompute).index(recompute), -interval


def lowest_memory(shape: StreamShape, device_bytes: int = 0) -> tuple[Recompute, int]:
    """Return (products recomputed, interval of the saved inputs) of the step that uses the least host memory."""
    return choose_saved_activations(shape, TierBudget(0, device_bytes))


def least_bytes(shape: StreamShape, device_bytes: int = 0) -> int:
    """Estimate the peak bytes on the host, per rank, of the training step that uses the least memory."""
    recompute, interval = lowest_memory(shape, device_bytes)
    return shape.host_bytes(device_bytes, interval, recompute)


def longest_sequence(shape: StreamShape, budget: TierBudget) -> int:
    """Return the tokens of the longest sequence that fits the budget with the least memory; 0 if none does."""
    layout, shortest = shape.layout, shape.layout.sequence_parallel_size

    def fits(num_tokens: int) -> bool:
        chunk_length = min(layout.chunk_length, num_tokens)
        at = replace(shape, layout=SequenceLayout(num_tokens, chunk_length, shortest))
        recompute, interval = choose_saved_activations(at, budget)
        return at.fits(budget, interval, recompute)

    low, high = 0, layout.sequence_length // shortest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * shortest) else (low, middle)
    return low * shortest


def _may_save(shape: StreamShape, products: Recompute, budget: TierBudget, flops_per_byte: FlopsPerByte) -> bool:
    on_host = shape.host_bytes(budget.device_bytes, 1, products)
    fits = on_host <= int(budget.host_bytes * _SHARE_WITH_PRODUCTS)
    return fits and shape.overlaps_with_link(products, flops_per_byte, on_host / shape.tier_bytes(1, products))
