"""Settings for Ulysses sequence parallelism and for FPDT: chunks, offloading, recomputation and memory budgets."""

from dataclasses import dataclass
from typing import NewType

from megatron.config.recompute import Recompute

ChunkSize = NewType("ChunkSize", int)
AUTOMATIC_CHUNK = ChunkSize(0)
_DEFAULT_CHUNK = 65536
GibOrAuto = NewType("GibOrAuto", float)
Folders = NewType("Folders", tuple[str, ...])


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism and FPDT.

    The world is data parallel x sequence parallel:
    rank = data_parallel_rank * sequence_parallel_size + sequence_parallel_rank.
    """

    ds_sequence_parallel_size: int = 1
    """Ranks that share one sequence (Ulysses); divides the sequence length and the world size. It need not divide the
    query heads, and may be larger."""

    ds_sequence_parallel_fpdt: bool = False
    """Stream every block chunk by chunk (Fully Pipelined Distributed Transformer, Ulysses-Offload)."""

    ds_sequence_parallel_fpdt_chunk_size: ChunkSize = AUTOMATIC_CHUNK
    """Tokens per FPDT chunk, over all sequence-parallel ranks together. Default: auto (or 0), the size that the planner
    estimates to be fastest where GPUs offload chunks, else 65536. With auto, and no other setting of chunks, a sequence
    that fits the GPU and is faster without FPDT runs without it."""

    ds_sequence_parallel_fpdt_offloading: bool = False
    """Offload FPDT's chunks to host memory, so that GPU memory does not grow with the sequence."""

    ds_sequence_parallel_fpdt_checkpoint_interval: int | None = None
    """Save the input of every Nth block for backward, and recompute the others from the attention outputs with
    token-wise work. Default: 1; with offloading the smallest that fits in host memory."""

    ds_sequence_parallel_fpdt_recompute: Recompute | None = None
    """Matrix products of a block that its backward pass recomputes. attention: all, and attention, for the N blocks of
    a checkpoint interval together, so that nothing but their first input need be saved; kv: all but the last, those
    before attention twice, so that keys and values need not be saved; all: all but the last; mlp: only the MLP's; none:
    no products, except for the first 8192 tokens per rank of each chunk where the GPU has no room to keep theirs. The
    outputs of the other products are saved like chunks. Default: as few as fit in host memory and can be copied without
    stalling compute; all without offloading."""

    ds_sequence_parallel_fpdt_device_memory: GibOrAuto | None = None
    """GiB per GPU that offloaded chunks may use; the others go to the host. Default: auto, what the GPU has left beside
    the planned use of everything else."""

    ds_sequence_parallel_fpdt_host_memory: float | None = None
    """GiB per rank that offloaded chunks may use on the host. Default: 97% of the memory available there at the start,
    shared equally by the ranks of the machine, less what offloaded optimizer states and the process will use."""

    ds_sequence_parallel_fpdt_disk: Folders | None = None
    """Folders on local disks, separated by commas, for the offloaded chunks that the host has no room for. Chunks are
    striped over them."""

    ds_sequence_parallel_fpdt_disk_memory: float | None = None
    """GiB per rank that offloaded chunks may use on disk, over all folders. Default: 90% of the space free there at the
    start, shared equally by the ranks of the machine. Only what the run needs is reserved."""

    tensor_model_parallel_size: int = 1
    """Only 1: there is no tensor parallelism here."""

    pipeline_model_parallel_size: int = 1
    """Only 1: there is no pipeline parallelism here."""

    no_pipeline_parallel: bool = False
    """Accepted for Megatron-DeepSpeed's scripts; always on."""

    distributed_timeout_minutes: float = 30.0
    """Timeout for a rank that is missing, silent or without progress: within it, all ranks exit and name that rank."""

    local_rank: int | None = None
    """Set by the launcher."""


def default_chunk(sequence_parallel_size: int) -> int:
    """Return the chunk size for auto where nothing is planned: a multiple of the ranks that share a sequence."""
    return max(_DEFAULT_CHUNK // sequence_parallel_size, 1) * sequence_parallel_size
