"""Step-time estimates: compute, copies and collectives that are not hidden behind it, and the optimizer.

block, forward     attention 2 S^2 B H D / p at the kernel's rate for the size of a head, products, grouped ones of
                   experts at a lower rate, token-wise kernels by their bytes, and the packing of the all-to-all
block, backward    attention 5/2 of that, products twice (of frozen weights once) and those recomputed, kernels, sums
                   over tiles, packing; before it the forward pass again where attention is recomputed
link               bytes of the chunks that are on the host, out and in, overlapped with compute, so that the longer of
                   the two counts; and between two blocks the last chunk's way to the host and back, if the next block
                   needs it at once
disk               bytes of the chunks that are on disk, written and read, overlapped with compute too
exchange           ZeRO-3's gathers of weights and the all-to-all from tokens to heads, overlapped with compute of the
                   previous row, so not for the first row; the all-to-all back to tokens counts as exposed: the rates
                   come from steps in which it was, and no step was measured since rows hide it
                   (without FPDT nothing is overlapped, and checkpointing recomputes the whole forward pass)
head               3 products with the vocabulary; 2 where it is frozen
optimizer          on the GPU bound by its memory, on the host by the host's; before it, the gradients' way to
                   their rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron.config import Recompute
from megatron.fpdt.loss import TILE_LOGITS
from megatron.fpdt.placement import HostBytes, place
from megatron.fpdt.stream import Saving
from megatron.planner.flops import (
    flops_of_recomputed_attention,
    flops_of_streaming,
    forward_flops,
    model_flops,
)
from megatron.planner.hardware import GB, TERA, Machines
from megatron.planner.job import HALF, SUM, Job

STREAMING = 0.7  # fraction of a GPU's memory bandwidth that token-wise kernels reach
# Passes over a token's hidden states and over its MLP's activations, fitted to a profile of a LLaMA block in slices of
# the usual length: the sums of the weights' gradients are in them.
HIDDEN_PASSES, MLP_PASSES = 45, 6
# Rate of torch's grouped products over that of single ones: the times in pytorch/ao#2490 are 525 and 545 TFLOP/s on an
# H100, forward, with 16 experts that share 8,192 tokens unevenly.
GROUPED = 0.74
# Per parameter of a rank: Adam reads weight, gradient and two moments in fp32 and writes all but the gradient. Before,
# the gradient is read for its norm, converted to fp32 and clipped; after, the weight is written in half precision.
OPTIMIZER_BYTES = 28 + 24 + 6
# Per parameter of the model: the gradient in fp32 is converted to half precision, copied to a bucket, and reduced.
GRADIENT_BYTES = 16
LOGIT_BYTES = 8  # per logit in half precision: written, read twice, its gradient written
# Parameters that Adam on the host updates per second and rank, measured with 16 cores; and the fixed overhead of a step
# in seconds, which is assumed.
HOST_ADAM, STEP_OVERHEAD = 1.2e9, 0.05


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, by part, and its model FLOPs."""

    forward: float  # all blocks, all accumulation steps
    backward: float
    head: float
    optimizer: float
    forward_waiting: float  # part of `forward` that waits for the link or the exchange
    backward_waiting: float
    waiting_for_link: float
    model_flops: int
    waiting_for_disk: float = 0.0
    disk_gbps: float = 0.0  # that a GPU's share of the disk must read and write, in sum, not to be waited for

    @property
    def waiting(self) -> float:
        return self.forward_waiting + self.backward_waiting

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.head + self.optimizer + STEP_OVERHEAD


def speed_of(
    job: Job, machines: Machines, backend: str, recompute: Recompute, interval: int, disk_share: float = 0.0
) -> Speed:
    """Estimate the time of one step, with a share of the chunks that are copied once out and once in on disk."""
    gpu, steps, layers = machines.gpu, job.accumulation_steps, job.model.num_layers
    compute = _block_compute(job, machines, backend, recompute, interval)
    if job.streamed:
        waits = _streamed_waits(job, machines, compute, _Saving(recompute, interval, disk_share))
    else:
        waits = _plain_waits(job, machines, recompute)
    parameters = job.trained_parameters / job.num_gpus
    on_gpu = parameters * OPTIMIZER_BYTES / (gpu.memory_gbps * GB * STREAMING)
    reduced = steps * job.trained_parameters * GRADIENT_BYTES / (gpu.memory_gbps * GB * STREAMING)
    sequences = job.global_tokens // job.model.seq_length
    return Speed(
        forward=steps * (layers * compute.forward + waits.forward),
        backward=steps * (layers * (compute.recomputed_forward + compute.backward) + waits.backward),
        head=steps * _head_seconds(job, machines),
        optimizer=reduced + (parameters / HOST_ADAM if job.cpu_optimizer else on_gpu),
        forward_waiting=steps * waits.forward,
        backward_waiting=steps * waits.backward,
        waiting_for_link=steps * waits.for_link,
        waiting_for_disk=steps * waits.for_disk,
        disk_gbps=waits.disk_gbps,
        model_flops=sequences * model_flops(job.model, job.padded_vocab_size, job.model.seq_length),
    )  # fmt: skip


@dataclass(frozen=True)
class _Compute:
    """Seconds of one block's compute on one rank."""

    forward: float
    recomputed_forward: float  # 0 if attention is not recomputed
    backward: float


def _block_compute(job: Job, machines: Machines, backend: str, recompute: Recompute, interval: int) -> _Compute:
    """Estimate the seconds of one block's compute on one rank."""
    model, gpu, shape = job.model, machines.gpu, job.shape
    share = job.micro_batch_size / job.sequence_parallel_size
    flops = forward_flops(model, 0, model.seq_length)
    again = flops_of_recomputed_attention(model, model.seq_length, interval, recompute)
    recomputes_attention = job.streamed and not recompute.saves_attention
    attention, products = (share * part / model.num_layers for part in (flops.attention, flops.token_wise))
    attention *= shape.heads.largest_num_heads / model.num_attention_heads  # the others wait
    recomputed = share * _recomputed_products(job, interval, recompute) / model.num_layers
    if recomputes_attention:
        recomputed -= share * again.total / model.num_layers
    times = 1 if job.is_frozen else 2  # dx alone, or dx and dW
    recomputed_attention = attention if job.activations != "kept" and not job.streamed else 0.0
    rate_forward, rate_backward = (rate * TERA for rate in gpu.attention_rates(backend, model.kv_channels))
    matmul, streaming = gpu.matmul_tflops * TERA, gpu.memory_gbps * GB * STREAMING
    tokens = shape.layout.local_length * job.micro_batch_size
    token_wise = tokens * HALF * _passed_elements(job) / streaming
    grouped = share * 2 * model.seq_length * model.sizes.token_weights.unsaved / model.num_layers
    slower = grouped * (1 / GROUPED - 1) / matmul  # of one pass
    chunks = shape.layout.num_chunks
    queries = tokens * shape.heads.largest_num_heads * model.kv_channels * HALF / chunks
    keys = shape.key_value_elements * HALF / chunks
    tiles = chunks * (chunks - 1) / 2
    packed = chunks if job.sequence_parallel_size > 1 else 0
    forward = attention / rate_forward + token_wise / 3 + slower
    forward += (tiles * 5 * queries + packed * (4 * queries + 2 * keys)) / streaming
    return _Compute(
        forward + products / matmul,
        forward + share * again.token_wise / model.num_layers / matmul if recomputes_attention else 0.0,
        2.5 * attention / rate_backward
        + recomputed_attention / rate_forward
        + (times * products + recomputed) / matmul
        + (times + (job.streamed or job.activations != "kept")) * slower
        + token_wise * 2 / 3
        + (tiles * 5 * (queries + keys) + packed * (10 * queries + 6 * keys) + _gradient_sum_bytes(job)) / streaming,
    )


def _passed_elements(job: Job) -> int:
    """Elements per token that the token-wise kernels of one block read and write."""
    shape, traffic = job.shape, job.model.sizes.expert_traffic
    outputs = shape.saved_mlp_outputs if traffic else shape.mlp_outputs
    return HIDDEN_PASSES * shape.hidden_size + MLP_PASSES * outputs + traffic


def _gradient_sum_bytes(job: Job) -> float:
    """Bytes of the additions to the weights' gradients of one block that are not among the passes.

    These have those of a dense model's weights, in slices of the usual length. The gradient of a stack of experts is a
    tensor, which is read, besides the sum, for each slice.
    """
    if job.is_frozen:
        return 0.0
    shape, weights = job.shape, job.model.sizes.token_weights
    num_slices = sum(-(-length // shape.slice_length) for length in shape.layout.local_lengths)
    dense = (weights.total - weights.unsaved) // job.model.num_layers
    stacks = max(job.mean_block_parameters - dense, 0) if job.model.sizes.largest_stack else 0
    short = num_slices - shape.layout.local_length / shape.slice_length
    return short * 2 * SUM * (job.mean_block_parameters - stacks) + num_slices * (2 * SUM + HALF) * stacks


def _recomputed_products(job: Job, interval: int, recompute: Recompute) -> int:
    """Return the FLOPs of matrix products that the backward pass of one sequence recomputes, over all blocks."""
    model, shape = job.model, job.shape
    if job.streamed:
        budget = shape.device_budget(job.device_memory_bytes, interval, recompute)
        return flops_of_streaming(model, shape.layout, shape.slice_length, Saving(recompute, interval, budget))
    return 0 if job.activations == "kept" else forward_flops(model, 0, model.seq_length).token_wise


def _head_seconds(job: Job, machines: Machines) -> float:
    """Estimate the seconds of output layer and loss, whose gradients are computed in the forward pass."""
    gpu, share = machines.gpu, job.micro_batch_size / job.sequence_parallel_size
    product = share * forward_flops(job.model, job.padded_vocab_size, job.model.seq_length).head
    product /= gpu.matmul_tflops * TERA
    streaming = gpu.memory_gbps * GB * STREAMING
    logits = share * job.model.seq_length * job.padded_vocab_size
    # Each tile reads and writes the sum of the weight's gradient in fp32.
    sums = logits / TILE_LOGITS * 2 * SUM * job.embedding_parameters / streaming
    gradient = 0.0 if job.is_frozen else max(product, sums)
    return 2 * product + gradient + logits * LOGIT_BYTES / streaming


@dataclass(frozen=True)
class _Waits:
    """Seconds in which compute waits, over all blocks of one accumulation step."""

    forward: float
    backward: float
    for_link: float
    for_disk: float = 0.0
    disk_gbps: float = 0.0


def _plain_waits(job: Job, machines: Machines, recompute: Recompute) -> _Waits:
    """Without FPDT no copy and no collective is overlapped."""
    inputs = job.shape.residual_bytes if job.activations == "recomputed from the host" else 0
    to_host, to_gpu = machines.link.seconds(0, inputs), machines.link.seconds(inputs, 0)
    forward, backward = _exchanges(job, machines, recompute)
    layers = job.model.num_layers
    return _Waits(
        layers * (forward.total + to_host), layers * (backward.total + to_gpu), for_link=layers * (to_host + to_gpu)
    )


class _Saving(NamedTuple):
    """What a step saves for backward, and the share of it on disk."""

    recompute: Recompute
    interval: int
    disk_share: float


def _streamed_waits(job: Job, machines: Machines, compute: _Compute, saving: _Saving) -> _Waits:
    """Compare the compute of each block, forward and backward, with its copies and collectives."""
    recompute, interval, _ = saving
    forward_exchange, backward_exchange = _exchanges(job, machines, recompute)
    exchanges = (forward_exchange, backward_exchange, forward_exchange)
    seconds = (compute.forward, compute.backward, compute.recomputed_forward)
    waits, for_link, for_disk, disk_gbps = [0.0, 0.0, 0.0], 0.0, 0.0, 0.0
    for block in place(job.shape, recompute, interval, job.device_memory_bytes).blocks:
        copies, (forward_turn, backward_turn) = _copies(job, block, recompute), _turns(job, machines, block, recompute)
        turns, moved = (forward_turn, backward_turn, forward_turn), _disk_bytes(block, saving)
        for phase in (0, 1) if recompute.saves_attention else (0, 1, 2):
            copying = max(machines.link.seconds(*copies[phase]) - seconds[phase], turns[phase], 0.0)
            for_link += copying
            on_disk = 0.0 if machines.disk is None else max(machines.disk.seconds(*moved[phase]) - seconds[phase], 0.0)
            for_disk += on_disk
            disk_gbps = max(disk_gbps, sum(moved[phase]) / seconds[phase] / GB)
            overlapped = max(copying, on_disk, exchanges[phase].overlapped - seconds[phase])
            waits[phase] += overlapped + exchanges[phase].exposed
    forward, backward, recomputed_forward = waits
    return _Waits(forward, backward + recomputed_forward, for_link, for_disk, disk_gbps)


def _disk_bytes(block: HostBytes, saving: _Saving) -> tuple[Copies, Copies, Copies]:
    """Bytes that one block reads from disk and writes to it: forward, backward, and in the recomputed forward pass."""
    # Chains of inputs are rebuilt from attention outputs, which are then read twice.
    rebuilt = 1 - 1 / saving.interval
    saved, share = block.attention + block.products, saving.disk_share
    saved_forward = saved if saving.recompute.saves_attention else 0
    return (
        (share * block.x, share * (block.y + saved_forward)),
        (share * (block.x + saved + rebuilt * (block.x + block.attention)), share * rebuilt * block.x),
        (share * block.x, share * (block.y + saved)),
    )


Copies = tuple[float, float]  # bytes to the GPU and to the host


def _copies(job: Job, block: HostBytes, recompute: Recompute) -> tuple[Copies, Copies, Copies]:
    """Bytes that one block copies, forward, backward, and in a forward pass that recomputes attention."""
    chunks = job.shape.layout.num_chunks
    # A column's tiles off the diagonal, on average; its first tile loads no sum, and its last stores none.
    kv_loads, dkv_loads = chunks / 2, (chunks - 1) / 2
    saved = block.attention + block.products
    recomputes_kv = not recompute.saves_keys_and_values  # from block inputs, which are copied in a second time
    saved_forward = saved if recompute.saves_attention else block.products
    return (
        (block.x + kv_loads * block.kv, block.y + block.kv + saved_forward),
        (
            (1 + recomputes_kv) * block.x + block.dy + saved + kv_loads * block.kv_backward + dkv_loads * block.dkv,
            block.dx + recomputes_kv * block.kv_backward + dkv_loads * block.dkv,
        ),
        (block.x_again + kv_loads * block.kv_again, block.y_again + block.kv_again + block.attention),
    )


def _turns(job: Job, machines: Machines, block: HostBytes, recompute: Recompute) -> tuple[float, float]:
    """Seconds in which the block after this one, forward and backward, waits for this block's last chunk.

    The chunk goes to the host and comes back. Forward, the products of its last slice leave before it. With several
    chunks the row of another one is computed meanwhile, but of two forward rows on several ranks only the projection.
    """
    shape, link = job.shape, machines.link
    chunks = shape.layout.num_chunks
    if chunks > 2 or (chunks == 2 and job.sequence_parallel_size == 1):
        return 0.0, 0.0
    tokens = shape.layout.local_lengths[0] * job.micro_batch_size
    projection = 2 * tokens * shape.hidden_size * shape.projection_width / (machines.gpu.matmul_tflops * TERA)
    share = block.products / max(shape.product_bytes(recompute), 1)
    leaves = share * shape.last_slice_product_bytes(recompute) + block.y / chunks
    forward = link.seconds(0, leaves) + link.seconds(block.y / chunks, 0)
    backward = link.seconds(0, block.dx) + link.seconds(block.dx, 0)
    return (forward, backward) if chunks == 1 else (max(forward - projection, 0.0), 0.0)


@dataclass(frozen=True)
class _Exchange:
    """Seconds of one block's collectives: those that compute overlaps with, and those that it waits for."""

    overlapped: float
    exposed: float

    @property
    def total(self) -> float:
        return self.overlapped + self.exposed


def _exchanges(job: Job, machines: Machines, recompute: Recompute) -> tuple[_Exchange, _Exchange]:
    """Estimate the seconds of one block's collectives, forward and backward."""
    shape, p = job.shape, job.sequence_parallel_size
    queries = shape.layout.local_length * job.micro_batch_size * shape.heads.largest_num_heads * shape.head_size * HALF
    keys = shape.key_value_elements * HALF
    all_to_all = (p - 1) / p / (machines.exchange_gbps(p) * GB)
    gather = 0.0
    if job.num_gpus > 1:
        weights = HALF * job.mean_block_parameters * (job.num_gpus - 1) / job.num_gpus
        gather = weights / (machines.exchange_gbps(job.num_gpus) * GB)
    gathers = gather if job.zero_stage == 3 else 0.0
    # An all-to-all overlaps with another row, and in an only row that of half the heads with the tiles of the others.
    exposed = 0.5 if shape.layout.num_chunks == 1 else 0.0
    forward, backward = ((sent + queries) * all_to_all for sent in (queries + keys, 3 * queries + 2 * keys))
    recomputed = 0 if recompute.saves_keys_and_values else keys * all_to_all
    return (
        _Exchange(gathers + (1 - exposed) * forward, exposed * forward),
        _Exchange(gathers + gather + recomputed + (1 - exposed) * backward, exposed * backward),
    )
