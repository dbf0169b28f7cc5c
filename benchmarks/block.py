"""Ways to run a transformer block forward and backward, and their measurement.

    offloaded     streamed chunk by chunk, all full-length tensors in host memory
    disk          as offloaded, but host memory holds no more than what is copied more than once per block; the rest is
                  on disk
    on-device     streamed chunk by chunk, all full-length tensors on the GPU
    recomputed    plain Ulysses on one rank: --checkpoint-activations with --checkpoint-in-cpu, no chunks
    ceiling       the same attention kernel, forward and backward over the whole sequence in one call each, on tensors
                  that exist already; and the block's matmuls as plain GEMMs over 32,768 tokens at a time, each once
                  forward and twice backward. No norm, RoPE, SwiGLU or residual, no recompute, no copies, no gradient
                  accumulation: the speed of any block if everything else were free
    deepspeed     DeepSpeed's own FPDT attention layer, see `benchmarks.deepspeed_layer`

Model FLOPs count every matmul once forward and twice backward, causal attention once as a triangle, and no
recompute (`megatron.planner.flops`).

"Peak above weights and their gradients" is the higher of two peaks of live GPU tensors, minus the prior allocation:

    forward       peak - weights
    backward      peak - weights - weight gradients, in the precision in which that way accumulates them (fp32 for
                  the streamed block, that of the weights where autograd accumulates)

The block's input, the gradient of its output, and everything between them count, wherever they are on the GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.common import (
    GIB,
    Geometry,
    Row,
    allocated_bytes,
    attempt,
    compute_dtype,
    gib,
    peak_bytes,
    reset_peak,
    spread,
    wall_seconds,
)
from megatron.config import ModelConfig, Recompute
from megatron.core.documents import Documents, Mask
from megatron.core.host_memory import available_host_bytes
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.disk_budget import BUSY_KINDS, DiskBudget
from megatron.fpdt.disk_files import STRIPE_BYTES
from megatron.fpdt.memory_model import StreamShape, TierBudget, choose_saved_activations
from megatron.fpdt.staging import staging_for
from megatron.fpdt.store import ChunkStore
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.model.layers import attention_request, attention_variant
from megatron.model.transformer import LanguageModel
from megatron.monitoring.kernel_times import kernels_of, seconds_by_kind, seconds_by_name
from megatron.ops.attention import QKV, AttentionOutput, choose_backend
from megatron.planner.flops import model_flops

NO_VOCABULARY = 0
SMALL_VOCABULARY = 128  # a model needs an embedding; the block does not
GEMM_TOKENS = 32768

# Takes the arguments of megatron.model.builder.build_model.
Build = Callable[[ModelConfig, int, ParallelState, Execution, Initialization], LanguageModel]


class Contestant(Protocol):
    """A block that can be run forward, then backward, repeatedly."""

    num_blocks: int
    weight_bytes: int
    gradient_bytes: int
    model_flops: int

    def prepare(self) -> None:
        """Make the input and release the gradients of the last run; not timed."""
        ...

    def forward(self) -> None: ...

    def backward(self) -> None: ...

    def host_bytes(self) -> tuple[int, int] | None:
        """Return (peak used, allocated) bytes of the host pool; None where there is none."""
        ...


class Source(torch.autograd.Function):
    """The input of a graph. Unlike a leaf, the graph does not save it: it is released after its last use."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class Sink(torch.autograd.Function):
    """The end of a graph: a scalar whose backward pass starts with the gradient given. It saves no output."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        ctx.dy = dy
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.dy, None


class GraphContestant:
    """Runs `run` between a source and a sink, as a block runs between its neighbors."""

    def __init__(self, run: Callable[[Tensor], Tensor], weights: Sequence[Tensor], make_x: Callable[[], Tensor],
                 dy: Tensor) -> None:  # fmt: skip
        self._run, self._weights, self._make_x, self._dy = run, weights, make_x, dy
        self._anchor = torch.zeros((), requires_grad=True)
        self._x: Tensor | None = None
        self._end: Tensor | None = None
        self._num_runs = 0

    def prepare(self) -> None:
        for weight in self._weights:
            weight.grad = None
        self._x = Source.apply(self._anchor, self._make_x)

    def forward(self) -> None:
        x, self._x = self._x, None
        assert x is not None, "prepare() comes first"
        self._num_runs += 1
        y = self._run(x)
        del x
        self._end = Sink.apply(y, self._dy)

    def backward(self) -> None:
        end, self._end = self._end, None
        assert end is not None, "forward() comes first"
        with torch.autograd.set_multithreading_enabled(False):  # as in training
            end.backward()


class ModelBlock(GraphContestant):
    """The block of this repository, run with `execution`; several are stacked, as in a model."""

    def __init__(
        self,
        config: ModelConfig,
        execution: Execution,
        device: torch.device,
        documents: Documents | None = None,
        build: Build = build_model,
    ) -> None:
        length, dtype = config.seq_length, compute_dtype(device)
        model = build(config, SMALL_VOCABULARY, ParallelState(), execution, Initialization(dtype, device))
        self._store: ChunkStore = model.execution.store  # type: ignore[attr-defined]
        blocks, shape = model.layers, (length, 1, config.hidden_size)
        positions = torch.arange(length).expand(1, length).contiguous()
        if device.type == "cuda":
            positions = positions.pin_memory()
        self._offloading = execution.offloading
        # Never on disk, where they could not be written to in place.
        in_memory = partial(self._store.empty, shape, dtype, ChunkKind.HIDDEN_GRADIENTS)
        dy = random_(in_memory(), device)
        stored_x = random_(in_memory(), device) if execution.offloading else None

        def make_x() -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device) if stored_x is None else stored_x.detach()

        def run(x: Tensor) -> Tensor:
            for block in blocks:
                x = block(x, positions, documents)
            return x

        super().__init__(run, list(blocks.parameters()), make_x, dy)
        self.num_blocks = config.num_layers
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        # The block whose backward pass runs last accumulates its gradients while those of all others exist.
        summed = sum(p.numel() * (4 if execution.fpdt else p.element_size()) for p in blocks[0].parameters())
        self.gradient_bytes = summed + sum(p.nbytes for block in blocks[1:] for p in block.parameters())
        attention_share = documents.squared_lengths / length**2 if documents else 1.0
        self.model_flops = model_flops(config, NO_VOCABULARY, length, attention_share)

    def host_bytes(self) -> tuple[int, int] | None:
        pool = self._store.pool
        return (pool.peak_used_bytes, self._store.pinned_bytes) if self._offloading else None

    def disk_traffic(self) -> Row:
        """Return what all runs have read from disk and written to it, per block; empty without a disk."""
        disk, runs = self._store.disk_tier, self.num_blocks * self._num_runs
        if disk is None:
            return {}
        return {
            "disk_read_gib": disk.copied.bytes_in / runs / GIB,
            "disk_written_gib": disk.copied.bytes_out / runs / GIB,
            "disk_stalled_seconds": disk.stalled_seconds / runs,
        }


class Ceiling:
    """The attention kernel and the matmuls alone, on tensors that exist already."""

    def __init__(self, geometry: Geometry, length: int, backend: str, device: torch.device) -> None:
        g, config, dtype = geometry, geometry.model_config(length), compute_dtype(device)
        random = partial(torch.randn, device=device, dtype=dtype)
        request = attention_request(config, device, dtype)
        self._attention, self._variant = choose_backend(backend, request), attention_variant(config).kernel(Mask.CAUSAL)
        q_width, kv_width = g.num_attention_heads * g.kv_channels, g.num_key_value_heads * g.kv_channels
        q, self._do = (random(length, 1, g.num_attention_heads, g.kv_channels) for _ in range(2))
        self._qkv = QKV(q, *(random(length, 1, g.num_key_value_heads, g.kv_channels) for _ in range(2)))
        shapes = [  # of the weights, [outputs, inputs]
            (q_width + 2 * kv_width, g.hidden_size),
            (g.hidden_size, q_width),
            (config.mlp_outputs, g.hidden_size),
            (g.hidden_size, g.ffn_hidden_size),
        ]
        tokens = min(length, GEMM_TOKENS)
        self._slices = [min(tokens, length - start) for start in range(0, length, tokens)]
        self._weights = [random(shape) for shape in shapes]
        self._products = [(w, random(tokens, w.shape[1]), random(tokens, w.shape[0])) for w in self._weights]
        self.num_blocks = 1
        self.weight_bytes = sum(w.nbytes for w in self._weights)
        self.gradient_bytes = 0  # allocated and released matmul by matmul
        self.model_flops = model_flops(config, NO_VOCABULARY, length)

    def prepare(self) -> None:
        self._saved: AttentionOutput | None = None

    def forward(self) -> None:
        self._saved = self._attention.forward(self._qkv, self._variant)
        for n in self._slices:
            for w, x, _ in self._products:
                torch.mm(x[:n], w.T)

    def backward(self) -> None:
        assert self._saved is not None, "forward() comes first"
        self._attention.backward(self._do, self._qkv, self._saved, self._variant)
        for n in self._slices:
            for w, x, dy in self._products:
                torch.mm(dy[:n], w)
                torch.mm(dy[:n].T, x[:n])

    def host_bytes(self) -> tuple[int, int] | None:
        return None


@dataclass(frozen=True)
class Way:
    """A way to run a block, by its name in the table."""

    name: str
    streamed: bool = False
    offloading: bool = False

    def execution(self, chunk: int, recompute: Recompute = Recompute.ALL) -> Execution:
        """Return the execution of the model; `chunk` matters only if it is streamed."""
        if self.streamed:
            return Execution(fpdt=True, chunk_size=chunk, offloading=self.offloading, recompute=recompute)
        return Execution(activation_checkpointing=True, checkpoint_in_cpu=True)


OFFLOADED = Way("offloaded", streamed=True, offloading=True)
DISK = Way("disk", streamed=True, offloading=True)
ON_DEVICE = Way("on-device", streamed=True)
RECOMPUTED = Way("recomputed")


def automatic_recompute(model: ModelConfig, chunk: int, device: torch.device) -> Recompute:
    """Return the recompute that a training run with offloading would choose on this machine."""
    shape = StreamShape.of(model, chunk, 1, 1, compute_dtype(device).itemsize)
    return choose_saved_activations(shape, TierBudget(available_host_bytes()), interval=1)[0]


def on_disk(
    execution: Execution, model: ModelConfig, device: torch.device, folders: tuple[str, ...], share: float
) -> Execution:
    """Return an execution whose host memory holds what is copied most, and the disk this share of all else."""
    shape = StreamShape.of(model, execution.chunk_size, 1, 1, compute_dtype(device).itemsize)
    needed = shape.kind_bytes(execution.checkpoint_interval, execution.recompute)
    # The input of the first block and the gradient of the last one's output are in memory besides.
    busy = {kind: needed[kind] for kind in BUSY_KINDS}
    busy[ChunkKind.HIDDEN_GRADIENTS] += 2 * shape.residual_bytes
    others = sum(num_bytes for kind, num_bytes in needed.items() if kind not in BUSY_KINDS)
    row = (shape.residual_bytes + shape.attention_bytes) // shape.layout.num_chunks
    disk = DiskBudget(
        folders,
        file_bytes=int(share * others) + 2 * shape.residual_bytes + STRIPE_BYTES,
        staging_bytes=staging_for(shape.residual_bytes + 2 * row),
        disk_share=share,
        reserved_bytes=busy,
    )
    # Chunks are placed whole, so either may hold a little more than its share.
    on_host = int((1 - share) * others) + (2 * shape.residual_bytes if share < 1 else 0)
    return replace(execution, host_memory_bytes=sum(busy.values()) + on_host, disk=disk)


def random_(tensor: Tensor, device: torch.device, part_tokens: int = 32768) -> Tensor:
    """Fill with random numbers from `device`, a part at a time."""
    for part in tensor.split(part_tokens):
        part.copy_(torch.randn(part.shape, device=device, dtype=tensor.dtype))
    return tensor


def measure(
    build: Callable[[], Contestant],
    device: torch.device,
    matmul: float,
    repeats: int,
    warm_ups: int = 1,
    profiled: bool = False,
) -> Row:
    """Measure speed, peak memory and host bytes of a contestant; a row with "failed" where memory runs out.

    With `profiled` it runs once more at the end, and the row gets a "profile".
    """
    return attempt(lambda: _measure(build, device, matmul, repeats, warm_ups, profiled), device)


def _measure(
    build: Callable[[], Contestant], device: torch.device, matmul: float, repeats: int, warm_ups: int, profiled: bool
) -> Row:
    before = allocated_bytes(device)
    contestant = build()
    seconds, forward_peaks, backward_peaks = [], [], []
    for _ in range(warm_ups + repeats):
        contestant.prepare()
        reset_peak(device)
        forward = wall_seconds(contestant.forward, device)
        forward_peaks.append(peak_bytes(device))
        reset_peak(device)
        backward = wall_seconds(contestant.backward, device)
        backward_peaks.append(peak_bytes(device))
        seconds.append((forward, backward))
    n = contestant.num_blocks
    totals = [(forward + backward) / n for forward, backward in seconds[warm_ups:]]
    forward, backward = (statistics.median(phase) / n for phase in zip(*seconds[warm_ups:], strict=True))
    rate = contestant.model_flops / n / statistics.median(totals) / 1e12
    peaks = _highest(forward_peaks[warm_ups:]), _highest(backward_peaks[warm_ups:])
    above = above_weights(*peaks, before, contestant.weight_bytes, contestant.gradient_bytes)
    used, allocated = contestant.host_bytes() or (None, None)
    return {
        "forward_seconds": forward, "backward_seconds": backward, "seconds": statistics.median(totals),
        "spread": spread(totals),
        "model_tflops": rate, "times_matmul": rate / matmul,
        "peak_gib": gib(_highest(peaks)), "above_gib": gib(above), "weights_gib": gib(contestant.weight_bytes),
        "host_used_gib": gib(used), "host_allocated_gib": gib(allocated),
        **(contestant.disk_traffic() if isinstance(contestant, ModelBlock) else {}),
        **({"profile": _profile(contestant)} if profiled else {}),
    }  # fmt: skip


def _profile(contestant: Contestant) -> Row:
    """Profile one more run; seconds are the total of all its blocks."""
    contestant.prepare()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        contestant.forward()
        contestant.backward()
        torch.cuda.synchronize()
    kernels = kernels_of(profile)
    return {"seconds": seconds_by_kind(kernels), "kernels": seconds_by_name(kernels)}


def _highest(peaks: Sequence[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def above_weights(
    forward_peak: int | None, backward_peak: int | None, before: int, weight_bytes: int, gradient_bytes: int
) -> int | None:
    """Return bytes above weights and weight gradients, as the module docstring defines them, without `before`."""
    if forward_peak is None or backward_peak is None:
        return None
    return max(forward_peak, backward_peak - gradient_bytes) - before - weight_bytes
