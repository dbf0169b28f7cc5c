"""From the configuration and the machine to how the model is executed."""

from __future__ import annotations

from megatron.config import Config
from megatron.fpdt.memory_model import StreamShape, choose_what_is_kept
from megatron.initialize import Context
from megatron.model.builder import Execution

GIB = 2**30


def choose_execution(config: Config, context: Context) -> Execution:
    """What the flags say, and what they leave open: what is kept of a block, by what the host can hold."""
    parallel, deepspeed = config.parallel, config.deepspeed
    device_memory = int(parallel.ds_sequence_parallel_fpdt_device_memory * GIB)
    asked = parallel.ds_sequence_parallel_fpdt_host_memory
    host_memory = context.host_memory_bytes if asked is None else int(asked * GIB)
    interval = parallel.ds_sequence_parallel_fpdt_checkpoint_interval
    recompute = parallel.ds_sequence_parallel_fpdt_recompute
    if parallel.ds_sequence_parallel_fpdt_offloading:
        budget = device_memory + host_memory
        shape = StreamShape.of(
            config.model,
            parallel.ds_sequence_parallel_fpdt_chunk_size,
            parallel.ds_sequence_parallel_size,
            config.training.micro_batch_size,
            context.dtype.itemsize,
        )
        recompute, interval = choose_what_is_kept(shape, budget, recompute, interval)
    return Execution(
        fpdt=parallel.ds_sequence_parallel_fpdt,
        chunk_size=parallel.ds_sequence_parallel_fpdt_chunk_size,
        offloading=parallel.ds_sequence_parallel_fpdt_offloading,
        device_memory_bytes=device_memory,
        host_memory_bytes=host_memory,
        checkpoint_interval=interval or 1,
        fpdt_recompute=recompute or "all",
        recompute=deepspeed.deepspeed_activation_checkpointing,
        checkpoint_in_cpu=deepspeed.checkpoint_in_cpu,
    )
