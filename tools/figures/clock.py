"""Simulated timeline of FPDT: the real schedule, with the time that each piece would take on a GPU.

`megatron.fpdt` runs unchanged on the CPU. In place of the GPU it uses simulated parts that compute nothing and count
time: a store whose copies, a stream whose all-to-all, and a kernel and a block whose compute occupy lanes of a clock.
So the order of execution and all waits come from the real stream; the duration of each piece comes from the planner's
rates. Tensors are those of the job with `SCALE` times fewer tokens. Every element of a block's input is the number of
its chunk, and queries and keys inherit it: this is how a tile knows its chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.core.collectives import Exchange, SharesToTokens
from megatron.core.parallel_state import ParallelState
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.block import StreamedBlock
from megatron.fpdt.block_chain import BlockChain
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.observer import Observer
from megatron.fpdt.seam import StreamedAttention
from megatron.fpdt.store import ChunkStore
from megatron.fpdt.stream import SLICE_LENGTH, Stream
from megatron.fpdt.streamed_layer import StreamedLayer
from megatron.fpdt.tiers import HostTier
from megatron.ops.attention import QKV, AttentionOutput, AttentionRequest, AttentionVariant, KernelVariant
from megatron.planner.flops import forward_flops
from megatron.planner.hardware import GB, TERA
from megatron.planner.plan import Plan

SCALE = 256
COMPUTE, ALL_TO_ALL, COPY_IN, COPY_OUT = LANES = ("compute", "all-to-all", "copy in", "copy out")
# Kinds of work, and of chunks: hidden states (x, y, dx, dy), attention output, log-sum-exp, kv, and dkv.
BEFORE, AFTER, TILE = "before", "after", "attention tile"
HIDDEN, OUTPUT, LSE, KEYS, GRADIENTS = "hidden", "o", "lse", "kv", "dkv"


class Piece(NamedTuple):
    """A piece of work that occupies a lane from `start` to `end`, in seconds."""

    lane: str
    kind: str
    label: str
    start: float
    end: float
    layer: int
    phase: str


@dataclass
class Clock(Observer):
    """When each lane is free, and the pieces that have run. A lane runs one piece at a time, in queue order."""

    free: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LANES, 0.0))
    pieces: list[Piece] = field(default_factory=list)
    layer: int = 0
    phase: str = ""

    def run(self, lane: str, kind: str, label: str, seconds: float, after: float = 0.0) -> float:
        """Queue a piece on its lane, to start not before `after`; return when it ends."""
        start = max(self.free[lane], after)
        self.free[lane] = start + seconds
        self.pieces.append(Piece(lane, kind, label, start, start + seconds, self.layer, self.phase))
        return start + seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Count no time and record no pieces."""
        free, num_pieces = dict(self.free), len(self.pieces)
        yield
        self.free = free
        del self.pieces[num_pieces:]

    def wait(self, until: float) -> None:
        """Make the compute lane wait until a time."""
        self.free[COMPUTE] = max(self.free[COMPUTE], until)

    def begin_chunk(self, phase: str, layer_number: int, chunk: int) -> None:
        """Set the layer and phase of the next pieces."""
        self.layer, self.phase = layer_number, phase


@dataclass(frozen=True)
class Seconds:
    """Durations of the pieces of one block on one rank, for whole chunks, (forward, backward)."""

    tile: tuple[float, float]
    before: tuple[float, float]
    after: tuple[float, float]
    before_recomputed: float
    after_recomputed: float
    per_byte: float
    per_exchanged_byte: float

    @classmethod
    def of(cls, plan: Plan) -> Seconds:
        """Derive durations from the planner's rates; token-wise time is split by the FLOPs of matrix products."""
        job, shape, gpu = plan.job, plan.job.shape, plan.machines.gpu
        p, layers, chunks = job.sequence_parallel_size, job.model.num_layers, shape.layout.num_chunks
        attention = forward_flops(job.model, 0, job.model.seq_length).attention / layers / p
        forward_rate, backward_rate = (rate * TERA for rate in gpu.attention[plan.backend])
        forward, backward = attention / forward_rate, 2.5 * attention / backward_rate
        before, last = shape.projection_width, shape.mlp_width
        after = shape.num_heads * shape.head_size + shape.mlp_outputs + last
        speed = plan.speed
        rest_forward = ((speed.forward - speed.forward_waiting) / layers - forward) / chunks / (before + after)
        rest_backward = (speed.backward - speed.backward_waiting) / layers - backward
        rest_backward /= chunks * (3 * (before + after) - last)
        full_tiles = chunks**2 / 2
        return cls(
            tile=(forward / full_tiles, backward / full_tiles),
            before=(before * rest_forward, 2 * before * rest_backward),
            after=(after * rest_forward, 2 * after * rest_backward),
            before_recomputed=before * rest_backward,
            after_recomputed=(after - last) * rest_backward,
            per_byte=SCALE / (plan.machines.link.to_gpu * GB),
            per_exchanged_byte=SCALE * (p - 1) / p / (plan.machines.exchange_gbps(p) * GB),
        )


class TimedTier(HostTier):
    """A host tier whose copies occupy the copy lanes, in the order that CUDA events would give them."""

    def __init__(self, clock: Clock, seconds: Seconds, kind_of: Callable[[Tensor], str]) -> None:
        super().__init__(torch.device("cpu"))
        self._clock, self._per_byte, self._kind_of = clock, seconds.per_byte, kind_of
        self._complete: dict[int, float] = {}  # by host address: when the chunk there is complete
        self._read_until: dict[int, float] = {}  # by address of the slab

    def empty(self, shape: Sequence[int], dtype: torch.dtype, kind: ChunkKind) -> Tensor:
        tensor, free = super().empty(shape, dtype, kind), self._clock.free
        free[COPY_OUT] = max(free[COPY_OUT], self._read_until.pop(tensor.data_ptr(), 0.0))
        return tensor

    def copy_in(self, chunk: Tensor) -> Any:
        arriving, _ = super().copy_in(chunk)
        queued = max(self._clock.free[COMPUTE], self._complete.get(chunk.data_ptr(), 0.0))
        arrived = self._read_until[chunk.untyped_storage().data_ptr()] = self._copy(COPY_IN, chunk, queued)
        return arriving, arrived

    def copy_out(self, chunk: Tensor, value: Tensor) -> Any:
        super().copy_out(chunk, value)
        copied = self._complete[chunk.data_ptr()] = self._copy(COPY_OUT, chunk, self._clock.free[COMPUTE])
        return copied

    def _copy(self, lane: str, chunk: Tensor, after: float) -> float:
        kind = self._kind_of(chunk)
        label = f"{KEYS} {chunk_of(chunk)}" if kind == KEYS else kind
        return self._clock.run(lane, kind, label, chunk.nbytes * self._per_byte, after)


class TimedStore(ChunkStore):
    """A store that offloads to a timed tier, and whose waits are those of a clock."""

    def __init__(self, clock: Clock, tier: TimedTier) -> None:
        super().__init__(torch.device("cpu"), offloading=True)
        self._clock, self.host_tier, self.pool = clock, tier, tier.pool
        self.offload_tiers = (tier,)

    def _wait_for(self, event: Any) -> None:
        self._clock.wait(event or 0.0)


def kind_of(chunk: Tensor, layout: SequenceLayout, num_heads: int) -> str:
    """Return the kind of a chunk: kv holds the tokens of all ranks, the attention output all heads."""
    if chunk.dim() == 3:
        return LSE if chunk.dtype == torch.float32 else HIDDEN
    if chunk.dtype == torch.float32:
        return GRADIENTS
    return OUTPUT if (len(chunk), chunk.shape[2]) == (layout.local_lengths[0], num_heads) else KEYS


@dataclass(frozen=True, eq=False)
class TimedStream(Stream):
    """A stream of one rank whose all-to-all occupies a lane, and returns tensors of the right shapes."""

    clock: Clock = field(default_factory=Clock)
    per_exchanged_byte: float = 0.0

    def start_tokens_to_heads(
        self, tensors: Sequence[Tensor], parts: Sequence[int] | None = None, num_shares: int = 1
    ) -> list[Exchange]:
        p = self.parallel_state.sequence_parallel_size
        shares = [t[:, :, : t.shape[2] // num_shares] for t in tensors]

        def finish(done: float) -> list[Tensor]:
            self.clock.wait(done)
            return [t.repeat(p, 1, 1, 1)[:, :, : t.shape[2] // p].contiguous() for t in shares]

        return [partial(finish, self.exchange(shares)) for _ in range(num_shares)]

    def shares_to_tokens(self, parts: Sequence[int] | None = None, num_shares: int = 1) -> SharesToTokens:
        return TimedSharesToTokens(self, num_shares)

    def exchange(self, tensors: Sequence[Tensor]) -> float:
        seconds = sum(t.nbytes for t in tensors) * self.per_exchanged_byte
        return self.clock.run(ALL_TO_ALL, ALL_TO_ALL, "", seconds, self.clock.free[COMPUTE])


class TimedSharesToTokens(SharesToTokens):
    """The all-to-alls of the shares of a timed stream back to tokens."""

    def __init__(self, stream: TimedStream, num_shares: int) -> None:
        super().__init__(None, stream.heads)
        self._stream, self._num_copies = stream, stream.parallel_state.sequence_parallel_size * num_shares

    def start(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._done = list(tensors), self._stream.exchange(tensors)

    def __call__(self) -> list[Tensor]:
        self._stream.clock.wait(self._done)
        p = self._stream.parallel_state.sequence_parallel_size
        return [t[: len(t) // p].repeat(1, 1, self._num_copies, 1) for t in self._tensors]


@dataclass(frozen=True)
class TimedAttention:
    """A backend whose tiles take simulated time and return zeros; queries and keys hold their chunk's number."""

    clock: Clock
    seconds: Seconds
    num_heads: int  # of a rank
    name: str = "timed"
    has_windows: bool = True

    def refusal(self, request: AttentionRequest) -> str | None:
        return None

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        self._run(qkv, variant, self.seconds.tile[0])
        q = qkv.q
        lse = q.new_zeros(q.shape[1], q.shape[2], q.shape[0], dtype=torch.float32)
        return AttentionOutput(torch.zeros_like(q), lse)

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._run(qkv, variant, self.seconds.tile[1])
        dq, dk, dv = (torch.zeros_like(t) for t in qkv)
        return dq, dk, dv

    def _run(self, qkv: QKV, variant: KernelVariant, seconds: float) -> None:
        label = f"{chunk_of(qkv.q)},{chunk_of(qkv.k)}"
        share = qkv.q.shape[2] / self.num_heads
        self.clock.run(COMPUTE, TILE, label, seconds * share / 2 if variant.is_causal else seconds * share)


class _Timed(torch.autograd.Function):
    """Identity, with a callback when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, in_backward: Callable[[], Any]) -> Tensor:
        ctx.in_backward = in_backward
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.in_backward()
        return grads[0], None


def chunk_of(tensor: Tensor) -> int:
    """Return the chunk number that all elements of a tensor hold."""
    return int(tensor.flatten()[0])


@dataclass
class TimedBlock:
    """A block whose token-wise work takes simulated time and passes its input on."""

    clock: Clock
    seconds: Seconds
    local_chunk_length: int
    layer_number: int
    num_heads: int
    num_key_value_heads: int
    uses_dropout: bool = False
    variant: AttentionVariant = field(default_factory=partial(AttentionVariant, 1.0))
    core_attention: StreamedAttention = field(default_factory=StreamedAttention)
    projects: bool = True

    def forward(self, x_SBh: Tensor, positions_BS: Tensor) -> Tensor:
        recomputed, seconds, x = torch.is_grad_enabled(), self.seconds, x_SBh
        if self.projects:
            x = self._work(BEFORE, x_SBh, seconds.before_recomputed if recomputed else seconds.before[0])
            x = _Timed.apply(x, lambda: self._work(BEFORE, x_SBh, seconds.before[1]))
        q = x.unflatten(2, (self.num_heads, -1))
        kv = torch.cat([q, q], 2)[:, :, : 2 * self.num_key_value_heads]
        o_SBHD = self.core_attention(q, kv, self.variant, 0.0, None)
        x = self._work(AFTER, x_SBh, seconds.after_recomputed if recomputed else seconds.after[0])
        return _Timed.apply(x, lambda: self._work(AFTER, x_SBh, seconds.after[1])) + o_SBHD.flatten(2)

    def _work(self, kind: str, x: Tensor, seconds: float) -> Tensor:
        share = len(x) / self.local_chunk_length
        self.clock.run(COMPUTE, kind, f"{kind} {chunk_of(x)}", seconds * share)
        return x

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


class TimedLayer(StreamedLayer):
    """A streamed layer that skips the time of products before attention whose values are not read."""

    layer: TimedBlock

    def run(self, *args: Any) -> Tensor:
        self.layer.projects = False
        try:
            return super().run(*args)
        finally:
            self.layer.projects = True


def timeline_of(plan: Plan, num_blocks: int, seconds: Seconds | None = None) -> list[Piece]:
    """Run `num_blocks` blocks of the plan's job, forward and backward; return the pieces of one rank."""
    model, clock, seconds = plan.job.model, Clock(), seconds or Seconds.of(plan)
    layout = scaled(plan.job.shape.layout)
    p, heads, local_chunk = layout.sequence_parallel_size, model.num_attention_heads, layout.local_lengths[0]
    store = TimedStore(clock, TimedTier(clock, seconds, lambda chunk: kind_of(chunk, layout, heads)))
    # The group only makes the stream see several ranks; nothing is sent to it.
    state = ParallelState(p, 0, p, 0, sequence_parallel_group=object())  # type: ignore[arg-type]
    stream = TimedStream(
        store, TimedAttention(clock, seconds, heads // p), state, plan.job.shape.heads, layout.chunk_length,
        SLICE_LENGTH // SCALE,
        observer=clock, clock=clock, per_exchanged_byte=seconds.per_exchanged_byte,
    )  # fmt: skip
    chunks = torch.arange(layout.local_length).view(-1, 1, 1) // local_chunk
    y = x = on_host(store, chunks.expand(-1, 1, model.hidden_size)).requires_grad_()
    positions = torch.arange(layout.local_length).expand(1, -1)
    chain = BlockChain(stream)
    for number in range(1, num_blocks + 1):
        block = TimedBlock(clock, seconds, local_chunk, number, heads, model.num_key_value_heads)
        streamed = StreamedBlock(stream, block, chain)
        streamed.layer = TimedLayer(stream, block)
        with clock.stopped():
            streamed.layer.trace(x[:1], positions[:, :1])  # a block does this in its first step only
        y = streamed(y, positions)
    y.backward(on_host(store, torch.zeros_like(x)))
    return clock.pieces


def scaled(layout: SequenceLayout) -> SequenceLayout:
    """Return the layout with `SCALE` times fewer tokens."""
    return SequenceLayout(layout.sequence_length // SCALE, layout.chunk_length // SCALE, layout.sequence_parallel_size)


def on_host(store: ChunkStore, numbers: Tensor) -> Tensor:
    """Store the numbers in half precision on the store's tier."""
    return store.empty(numbers.shape, torch.bfloat16).copy_(numbers)
