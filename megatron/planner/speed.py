"""Step-time estimates: compute, copies and collectives that are not hidden behind it, and the optimizer.

block, forward     attention 2 S^2 B H D / p at the kernel's rate, products, token-wise kernels by their bytes
block, backward    attention 5/2 of that, products twice and those recomputed, kernels, sums over tiles
link               bytes to the host and back, overlapped with compute, so that the longer of the two counts
exchange           all-to-all of the chunks and ZeRO-3's gathers of weights, overlapped too
                   (without FPDT neither is overlapped, and checkpointing recomputes the whole forward pass)
head               3 products with the vocabulary
optimizer          on the GPU bound by its memory, on the host by the host's
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import Recompute
from megatron.fpdt.loss import TILE_LOGITS
from megatron.planner.flops import flops_of_streaming, forward_flops, model_flops
from megatron.planner.hardware import GB, TERA, Machines
from megatron.planner.job import HALF, SUM, Job

BOTH_WAYS = 1.3  # link rate of both directions at once over one direction; measured on two H200 together
STREAMING = 0.7  # fraction of a GPU's memory bandwidth that token-wise kernels reach
# Passes over a token's hidden states and over its MLP's activations, fitted to a profile of a LLaMA block.
HIDDEN_PASSES, MLP_PASSES = 45, 6
# Per parameter: weight, two moments and gradient in fp32, read and written, and the weight in half precision.
OPTIMIZER_BYTES = 34
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
    waiting: float  # part of `forward` and `backward` that waits for the link or the exchange
    model_flops: int

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.head + self.optimizer + STEP_OVERHEAD


def speed_of(job: Job, machines: Machines, backend: str, recompute: Recompute, interval: int) -> Speed:
    """Estimate the time of one step."""
    gpu, steps, layers = machines.gpu, job.accumulation_steps, job.model.num_layers
    forward, backward = _block_compute(job, machines, backend, recompute, interval)
    exchange = _exchange_seconds(job, machines, recompute)
    if job.streamed:
        link = _link_seconds(job, machines, recompute)
        phases = zip((forward, backward), link, exchange, strict=True)
        waits = [max(0.0, copying - compute, exchanging - compute) for compute, copying, exchanging in phases]
    else:
        inputs = job.shape.residual_bytes if job.activations == "recomputed from the host" else 0
        waits = [exchanging + _link(inputs, 0, machines) for exchanging in exchange]  # not overlapped
    parameters = job.num_parameters / job.num_gpus
    on_gpu = parameters * OPTIMIZER_BYTES / (gpu.memory_gbps * GB * STREAMING)
    sequences = job.global_tokens // job.model.seq_length
    return Speed(
        forward=steps * layers * (forward + waits[0]),
        backward=steps * layers * (backward + waits[1]),
        head=steps * _head_seconds(job, machines),
        optimizer=parameters / HOST_ADAM if job.cpu_optimizer else on_gpu,
        waiting=steps * layers * sum(waits),
        model_flops=sequences * model_flops(job.model, job.padded_vocab_size, job.model.seq_length),
    )  # fmt: skip


def _block_compute(
    job: Job, machines: Machines, backend: str, recompute: Recompute, interval: int
) -> tuple[float, float]:
    """Estimate the seconds of one block's compute, forward and backward, on one rank."""
    model, gpu, shape = job.model, machines.gpu, job.shape
    share = job.micro_batch_size / job.sequence_parallel_size
    flops = forward_flops(model, 0, model.seq_length)
    attention, products = (share * part / model.num_layers for part in (flops.attention, flops.token_wise))
    recomputed = share * _recomputed_products(job, interval, recompute) / model.num_layers
    recomputed_attention = attention if job.activations != "kept" and not job.streamed else 0.0
    rate_forward, rate_backward = (rate * TERA for rate in gpu.attention[backend])
    matmul, streaming = gpu.matmul_tflops * TERA, gpu.memory_gbps * GB * STREAMING
    tokens = shape.layout.local_length * job.micro_batch_size
    token_wise = tokens * HALF * (HIDDEN_PASSES * model.hidden_size + MLP_PASSES * shape.mlp_outputs) / streaming
    chunks = shape.layout.num_chunks
    queries = tokens * model.num_attention_heads * model.kv_channels * HALF / chunks
    keys = shape.key_value_elements * HALF / chunks
    tiles = chunks * (chunks - 1) / 2
    return (
        attention / rate_forward + products / matmul + token_wise / 3 + tiles * 5 * queries / streaming,
        2.5 * attention / rate_backward
        + recomputed_attention / rate_forward
        + (2 * products + recomputed) / matmul
        + token_wise * 2 / 3
        + tiles * 5 * (queries + keys) / streaming,
    )


def _recomputed_products(job: Job, interval: int, recompute: Recompute) -> int:
    """Return the FLOPs of matrix products that the backward pass of one sequence recomputes, over all blocks."""
    model, shape = job.model, job.shape
    if job.streamed:
        return flops_of_streaming(model, shape.layout, shape.slice_length, interval, recompute)
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
    return 2 * product + max(product, sums) + logits * LOGIT_BYTES / streaming


def _link_seconds(job: Job, machines: Machines, recompute: Recompute) -> tuple[float, float]:
    """Estimate the seconds of copying one block's chunks to and from the host, forward and backward."""
    shape = job.shape
    hidden, keys = shape.residual_bytes, shape.key_value_bytes
    attention_and_products = shape.attention_bytes + shape.product_bytes(recompute)
    recomputes_kv = not recompute.saves_keys_and_values  # from block inputs, which are copied in a second time
    chunks = shape.layout.num_chunks
    others = (chunks - 1) / 2  # tiles off the diagonal per chunk
    return (
        _link(hidden + others * keys, hidden + keys + attention_and_products, machines),
        _link(
            (2 + recomputes_kv) * hidden + attention_and_products + others * 3 * keys + 2 * keys,
            hidden + others * 2 * keys + recomputes_kv * keys,
            machines,
        ),
    )


def _link(bytes_in: float, bytes_out: float, machines: Machines) -> float:
    rate = machines.gpu.link_gbps * GB
    return max(bytes_in, bytes_out, (bytes_in + bytes_out) / BOTH_WAYS) / rate


def _exchange_seconds(job: Job, machines: Machines, recompute: Recompute) -> tuple[float, float]:
    """Estimate the seconds of one block's collectives, forward and backward."""
    shape, p = job.shape, job.sequence_parallel_size
    queries = shape.layout.local_length * job.micro_batch_size * shape.num_heads * shape.head_size * HALF
    keys = shape.key_value_elements * HALF
    all_to_all = (p - 1) / p / (machines.exchange_gbps(p) * GB)
    gather = 0.0
    if job.num_gpus > 1:
        weights = HALF * job.block_parameters * (job.num_gpus - 1) / job.num_gpus
        gather = weights / (machines.exchange_gbps(job.num_gpus) * GB)
    gathers = gather if job.zero_stage == 3 else 0.0
    return (
        (2 * queries + keys) * all_to_all + gathers,
        (4 * queries + (2 if recompute.saves_keys_and_values else 3) * keys) * all_to_all + gathers + gather,
    )
