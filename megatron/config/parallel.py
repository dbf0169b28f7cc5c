"""How the work is spread over ranks and cut along the sequence."""

from dataclasses import dataclass
from typing import Literal, NewType

ChunkSize = NewType("ChunkSize", int)
AUTOMATIC_CHUNK = ChunkSize(0)

Recompute = Literal["kv", "all", "mlp", "none"]
SAVING_PRODUCTS: tuple[Recompute, ...] = ("none", "mlp")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism and FPDT.

    The world is data parallel x sequence parallel:
    rank = data_parallel_rank * sequence_parallel_size + sequence_parallel_rank.
    """

    ds_sequence_parallel_size: int = 1
    """Ranks that share one sequence (Ulysses); divides the query heads, the sequence length and the world size."""

    ds_sequence_parallel_fpdt: bool = False
    """Stream every block chunk by chunk (Fully Pipelined Distributed Transformer, Ulysses-Offload)."""

    ds_sequence_parallel_fpdt_chunk_size: ChunkSize = ChunkSize(65536)
    """Tokens per FPDT chunk, over all sequence-parallel ranks together; auto (or 0) for what the planner finds quickest
    on the GPUs there are."""

    ds_sequence_parallel_fpdt_offloading: bool = False
    """Keep FPDT's chunks in host memory, so that device memory does not grow with the sequence."""

    ds_sequence_parallel_fpdt_checkpoint_interval: int | None = None
    """Keep the input of every Nth block for the backward pass, and rebuild the others from the attention outputs, by
    token-wise work. Default: 1; with offloading the smallest that fits in the host's memory."""

    ds_sequence_parallel_fpdt_recompute: Recompute | None = None
    """Matrix products of a block that its backward pass runs again: all but the last, those before attention twice, so
    that keys and values need not be kept (kv); all but the last; the MLP's alone; none, but for the first 8192 tokens
    per rank of each chunk. The outputs of the others are kept as chunks are. Default: as few as fit in the host's
    memory and as the link to it has time for; all without offloading."""

    ds_sequence_parallel_fpdt_device_memory: float = 0.0
    """GiB per GPU that offloaded chunks may take up before they go to the host. Two gradients of hidden states come on
    top where the hidden states are on the GPU."""

    ds_sequence_parallel_fpdt_host_memory: float | None = None
    """GiB per rank that offloaded chunks may take up on the host. Default: 97% of what is free there at the start,
    shared equally by the ranks of the machine, less what optimizer states on the host and the process will take."""

    tensor_model_parallel_size: int = 1
    """Only 1: there is no tensor parallelism here."""

    pipeline_model_parallel_size: int = 1
    """Only 1: there is no pipeline parallelism here."""

    no_pipeline_parallel: bool = False
    """Accepted for Megatron-DeepSpeed's scripts; always the case."""

    distributed_timeout_minutes: float = 30.0
    """How long a rank may be missing, silent or without progress: within this time all ranks end and it is named."""

    local_rank: int | None = None
    """Set by the launcher."""
