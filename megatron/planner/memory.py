"""Memory estimates of a job: GPU and host memory per rank.

GPU: the model states that DeepSpeed keeps there, plus the peak of a streamed block. In bytes of a rank's chunk,

    X hidden states    Q queries (as many: o, do, dq in half precision)    K keys and values together
    W workspace of the attention kernel

    tiles, backward             3 X + 6 Q + 10 K + W   x, dx, norm; q, o, do, dq in half precision and fp32; the row's
                                                       dkv; kv, its tile's gradient and dkv in fp32; the next tile's
                                                       kv and dkv; the dkv being copied out
    a row's last tile           5 X + 7 Q + 7 K + W    the next row's x, o, dy instead of the next tile
    after, backward             4 X + 2 Q + 4 K + slice + prefetched products
    forward                     3 X + 5 Q + 4 K + products of a chunk

With several ranks per sequence, two other rows are in progress while a row's tiles run:

    the next row, started       4 X + 3 Q + 2 K        x, dx, norm; q, kv, o, do in the all-to-all
    the previous row            3 X + Q + K            x, dx, norm; dq, dkv in the all-to-all; from three chunks on

Without FPDT the sequence is one chunk, and the estimate counts what autograd saves for backward. docs/planner.md
compares the estimates with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import Recompute
from megatron.fpdt.loss import TILE_LOGITS
from megatron.fpdt.memory_model import StreamShape, TierBudget, choose_saved_activations
from megatron.fpdt.placement import place
from megatron.planner.hardware import GIB, Machines
from megatron.planner.job import HALF, SUM, Job

OPTIMIZER = 12  # fp32 weight and Adam's two moments
REDUCE_BUCKET = 500_000_000  # DeepSpeed's default, in numbers
STEP_GROUP = 1_000_000_000  # parameters after which ZeRO-3's optimizer step starts a new group, DeepSpeed's default
MATRICES = 4  # of a block
OUTSIDE_TORCH = 1.5 * GIB  # CUDA's context, NCCL's buffers, kernels
FRAGMENTATION = 1.05
ACCURACY = 0.1  # relative error of `gpu` against measurements (docs/planner.md)
HOST_PROCESS, PLAIN_PROCESS = 2.5 * GIB, 4.0 * GIB  # Python, torch and DeepSpeed of one rank, and without FPDT
LOGITS = 2 * HALF * TILE_LOGITS  # a tile of the output layer and its gradient


@dataclass(frozen=True)
class Memory:
    """Bytes per rank."""

    states: int  # weights, optimizer states and all else that is on the GPU between two steps
    step: int  # peak of the optimizer step above `states`
    block: int  # peak of the forward and backward pass above `states`, gradients included
    host_states: int
    host_chunks: int
    host_process: int
    recompute: Recompute
    checkpoint_interval: int
    disk_chunks: int = 0
    disk_reserved: int = 0  # for them
    disk_share: float = 0.0  # of the chunks that are copied once out and once in

    @property
    def gpu(self) -> int:
        """Peak of live tensors on the GPU."""
        return self.states + max(self.step, self.block)

    @property
    def gpu_with_overhead(self) -> int:
        """Memory that the GPU needs: the peak, the allocator's fragmentation, and memory outside torch."""
        return int(self.gpu * FRAGMENTATION + OUTSIDE_TORCH)

    @property
    def host(self) -> int:
        """Host memory of the rank, its process included."""
        return self.host_states + self.host_chunks + self.host_process


def memory_of(job: Job, machines: Machines, backend: str) -> Memory:
    """Estimate the memory of a job, choosing what is left open as a training run does."""
    states = _states(job)
    process = int(HOST_PROCESS if job.streamed else PLAIN_PROCESS)
    host = max(int(machines.host_bytes_per_gpu - states.host - process), 0)
    budget = TierBudget(host, job.device_memory_bytes, machines.disk_bytes_per_gpu)
    recompute, interval = choose_saved_activations(
        job.shape, budget, job.recompute, job.checkpoint_interval, machines.flops_per_byte
    )
    if job.streamed:
        passes = _streamed_bytes(job, recompute, interval, backend)
        on_host = job.shape.host_bytes(job.device_memory_bytes, interval, recompute)
        with_disk = job.shape.on_host_and_disk(budget, interval, recompute) if on_host > host else None
    else:
        on_gpu, on_host = activation_bytes(job, backend)
        with_disk = None
        passes = max(on_gpu + _block_parameters(job), _head_bytes(job))
    hidden, _, _ = _chunk_bytes(job.shape)
    return Memory(
        states=states.persistent,
        step=states.step + hidden,  # the last chunk of a gradient is released by the next step
        block=states.gradients + max(passes, _embedding_bytes(job)),
        host_states=states.host,
        host_chunks=on_host if with_disk is None else with_disk.host_bytes + with_disk.staging_bytes,
        host_process=process,
        recompute=recompute,
        checkpoint_interval=interval,
        disk_chunks=0 if with_disk is None else with_disk.disk_bytes,
        disk_reserved=0 if with_disk is None else with_disk.file_bytes,
        disk_share=0.0 if with_disk is None else with_disk.disk_share,
    )


def _streamed_bytes(job: Job, recompute: Recompute, interval: int, backend: str) -> int:
    """Estimate the peak bytes of blocks and head on the GPU, with the chunks stored there."""
    adapters = job.model.sizes.adapters
    # Stacks of experts with what is added to them, and a weight that a product dequantizes.
    added = adapters.added_stacks + adapters.largest_quantized if adapters else 0
    placed = place(job.shape, recompute, interval, job.device_memory_bytes)
    forward, backward = block_bytes(job.shape, recompute, backend)
    return max(
        forward + placed.forward_device_bytes + 2 * _gathered(job, job.block_bytes) + HALF * added,
        _head_bytes(job) + placed.loss_device_bytes,
        backward + placed.backward_device_bytes + _block_parameters(job),
    )


@dataclass(frozen=True)
class _States:
    """Bytes of the model states per rank: between two steps, and on top in the backward and in the optimizer step."""

    persistent: int
    gradients: int
    step: int
    host: int


def _states(job: Job) -> _States:
    """Estimate the model states of DeepSpeed 0.19.8 under each ZeRO stage."""
    parameters, ranks = job.trained_parameters, job.num_gpus
    whole, shard = HALF * parameters, HALF * parameters // ranks
    optimizer = OPTIMIZER * parameters // ranks
    bucket = HALF * min(REDUCE_BUCKET, parameters)
    weights = job.weight_bytes // (ranks if job.zero_stage == 3 else 1)
    if job.cpu_optimizer:
        # The largest table passes through a buffer on either side.
        largest = HALF * min(max(job.embedding_parameters, job.position_parameters), parameters)
        buffers = bucket if job.zero_stage == 3 else largest
        gradients = (0 if job.zero_stage >= 2 else whole) + (0 if job.zero_stage == 3 else bucket)
        return _States(weights + buffers, gradients, 0, _host_states(job, largest))
    if job.zero_stage == 3:
        return _States(weights + optimizer + shard + bucket, 0, (HALF + SUM) * _step_group(job), 0)
    gradients = shard if job.zero_stage == 2 else whole
    # The gradients, a copy of them as one flat tensor, and that in fp32.
    return _States(weights + optimizer, gradients + bucket, gradients + shard + 2 * shard, 0)


def _host_states(job: Job, largest: int) -> int:
    """Bytes of optimizer states, fp32 weights and gradients on the host, `largest` those of the largest table.

    Adam's moments are not pinned. ZeRO-3 pins the gradients, in fp32 by the group and in half precision as a whole, and
    converts a group's new weights on the host. The other stages pin all but the moments.
    """
    parameters, ranks = job.trained_parameters, job.num_gpus
    single, half = SUM * parameters // ranks, HALF * parameters // ranks
    if job.zero_stage == 3:
        groups = _step_groups(job)
        pinned = [half, *(SUM * group for group in groups)]
        return 3 * single + sum(map(_pinned_bytes, pinned)) + HALF * max(groups)
    return 2 * single + sum(map(_pinned_bytes, (single, single, half, largest)))


def _pinned_bytes(num_bytes: int) -> int:
    """Return the bytes that torch allocates for a pinned tensor: the next power of two."""
    return 1 << (num_bytes - 1).bit_length()


def _step_group(job: Job) -> int:
    """Return the largest group of a rank's parameters that ZeRO-3 steps at once."""
    return max(_step_groups(job))


def _step_groups(job: Job) -> list[int]:
    """Return the groups of a rank's parameters that ZeRO-3 steps at once: each is filled up to STEP_GROUP."""
    sizes = job.model.sizes
    if sizes.adapters is not None:
        num_groups = -(-job.trained_parameters // (job.num_gpus * STEP_GROUP))
        return [job.trained_parameters // (job.num_gpus * num_groups)] * num_groups
    matrix = max(job.mean_block_parameters // MATRICES, sizes.largest_stack)
    tables = [job.embedding_parameters, job.position_parameters]
    groups = [0]
    for size in [*tables, *[matrix] * -(-sizes.all_block_weights // matrix), job.output_parameters]:
        if groups[-1] >= STEP_GROUP:
            groups.append(0)
        groups[-1] += size // job.num_gpus
    return groups


def _block_parameters(job: Job) -> int:
    """Bytes of a block's gathered weights, its gradients and their sums, and the next block's prefetched weights."""
    adapters = job.model.sizes.adapters
    if adapters is None:
        return _whole_bytes(job, job.block_parameters) + _gathered(job, job.block_bytes)
    gathered = 2 * _gathered(job, job.block_bytes + HALF * adapters.block_weights)
    # Stacks of experts with what is added to them, and their gradients; a weight that a product dequantizes.
    stacks = HALF * (2 * adapters.added_stacks + adapters.largest_quantized)
    return gathered + (SUM + HALF) * adapters.block_weights + stacks


def _head_bytes(job: Job) -> int:
    """Bytes of the gathered output layer, its summed gradient, a tile of logits, and the chunks in flight."""
    hidden, _, _ = _chunk_bytes(job.shape)
    return _whole_bytes(job, job.embedding_parameters) + LOGITS + 6 * hidden


def _embedding_bytes(job: Job) -> int:
    """Bytes of the gathered word and position embeddings, their summed gradients, and the chunks in flight."""
    hidden, _, _ = _chunk_bytes(job.shape)
    return _whole_bytes(job, job.embedding_parameters + job.position_parameters) + 6 * hidden


def _whole_bytes(job: Job, parameters: int) -> int:
    """Bytes of gathered weights and, where they are trained, their gradients and the fp32 sums of these."""
    return _gathered(job, HALF * parameters) + (0 if job.is_frozen else (SUM + HALF) * parameters)


def _gathered(job: Job, num_bytes: int) -> int:
    """Bytes of weights that ZeRO-3 gathers, 0 where they are not partitioned."""
    return num_bytes if job.zero_stage == 3 and job.num_gpus > 1 else 0


def block_bytes(shape: StreamShape, recompute: Recompute, backend: str) -> tuple[int, int]:
    """Estimate the peaks of a streamed block, forward and backward, above weights, weight gradients and its chunks."""
    hidden, queries, keys = _chunk_bytes(shape)
    workspace = _workspace_bytes(shape, backend)
    products, after_slice = _slice_bytes(shape, recompute)
    others = 0 if shape.layout.sequence_parallel_size == 1 else 1 if shape.layout.num_chunks < 3 else 2
    in_progress = (0, 4 * hidden + 3 * queries + 2 * keys, 7 * hidden + 4 * queries + 3 * keys)[others]
    backward = (
        5 * hidden + 7 * queries + 7 * keys + workspace,
        3 * hidden + 6 * queries + 10 * keys + workspace,
        4 * hidden + 2 * queries + 4 * keys + after_slice + products,
    )
    forward = 3 * hidden + 5 * queries + 4 * keys + shape.chunk_product_bytes(recompute)
    # With a norm of q and k, the projection of each row in progress is saved; otherwise it is released early.
    projections = _projection_bytes(shape) * shape.normalizes_products * (1 + others)
    both = in_progress + projections
    return forward + both, max(backward) + both


def activation_bytes(job: Job, backend: str) -> tuple[int, int]:
    """Estimate the peak bytes (on the GPU, on the host) of activations in a run without FPDT.

    Of a block, autograd saves its two norms, q, k, v, o, the residual stream, and the inputs of the MLP's layers. The
    peak is in the backward of the MLP, or in that of attention, after the MLP's activations are released.
    """
    shape, num_layers = job.shape, job.model.num_layers
    hidden, queries, keys = _chunk_bytes(shape)
    first, width = _mlp_bytes(shape)
    exchanged = queries if shape.layout.sequence_parallel_size > 1 else 0  # o with heads scattered, and with tokens
    saved = 4 * hidden + 2 * queries + keys + exchanged + first + width
    attention = 2 * queries + keys + _workspace_bytes(shape, backend) - first - width
    block = saved + hidden + max(first, attention)
    match job.activations:
        case "kept":
            return block + (num_layers - 1) * saved, 0
        case "recomputed":
            return block + num_layers * hidden, 0
        case "recomputed from the host":
            return block, num_layers * _pinned_bytes(hidden)


def _mlp_bytes(shape: StreamShape) -> tuple[int, int]:
    """(outputs of the MLP's first layer, inputs of its second) of one chunk on one rank."""
    tokens = shape.layout.local_lengths[0] * shape.batch_size
    return tokens * shape.mlp_outputs * shape.element_size, tokens * shape.mlp_width * shape.element_size


def _workspace_bytes(shape: StreamShape, backend: str) -> int:
    """Bytes of the workspace that the backward of the attention kernel allocates."""
    _, queries, keys = _chunk_bytes(shape)
    if shape.heads.queries_per_key == 1:
        return 2 * queries
    # Sums of dk and dv in fp32, or dk and dv of every query head in half precision.
    return 2 * queries + (2 * keys if backend.startswith("flash-attn-4") else 2 * queries)


def _chunk_bytes(shape: StreamShape) -> tuple[int, int, int]:
    """(hidden states, queries, keys and values) of one chunk on the rank with the most heads."""
    tokens = shape.layout.local_lengths[0] * shape.batch_size
    share = shape.layout.local_length * shape.batch_size / tokens
    keys = int(shape.key_value_elements / share) * shape.element_size
    size = shape.element_size
    return tokens * shape.hidden_size * size, tokens * shape.heads.largest_num_heads * shape.head_size * size, keys


def _projection_bytes(shape: StreamShape) -> int:
    """Queries, keys and values of one chunk on one rank, as they are projected."""
    return shape.layout.local_lengths[0] * shape.batch_size * shape.projection_width * shape.element_size


def _slice_bytes(shape: StreamShape, recompute: Recompute) -> tuple[int, int]:
    """Bytes of (the next slice's prefetched products, the backward of `after` for one slice)."""
    tokens = min(shape.slice_length, shape.layout.local_lengths[0]) * shape.batch_size
    size = shape.element_size
    widths = (shape.hidden_size, shape.saved_mlp_outputs, shape.mlp_outputs, shape.mlp_width)
    hidden, saved, first, width = (n * tokens * size for n in widths)
    projection = _projection_bytes(shape)
    after = hidden + (saved if recompute.saves_mlp_products else 0)
    prefetched = max(projection, after) if recompute.saves_products else 0
    # The first layer's outputs and their gradient, the gradient of the second layer's input, and some hidden states.
    return prefetched, 2 * first + width + 6 * hidden
