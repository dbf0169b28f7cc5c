"""From the configuration and the machine to how the model is executed."""

from __future__ import annotations

from megatron.config import Config
from megatron.fpdt.memory_model import StreamShape, choose_checkpoint_interval
from megatron.initialize import Context
from megatron.model.builder import Execution

GIB = 2**30


def choose_execution(config: Config, context: Context) -> Execution:
    """What the flags say, and what they leave open: how often a block's input is kept, by what the host can hold."""
    parallel, deepspeed = config.parallel, config.deepspeed
    device_memory = int(parallel.ds_sequence_parallel_fpdt_device_memory * GIB)
    asked = parallel.ds_sequence_parallel_fpdt_host_memory
    host_memory = context.host_memory_bytes if asked is None else int(asked * GIB)
    interval = parallel.ds_sequence_parallel_fpdt_checkpoint_interval
    if interval is None and parallel.ds_sequence_parallel_fpdt_offloading:
        interval = choose_checkpoint_interval(stream_shape(config, context), device_memory + host_memory)
    return Execution(
        fpdt=parallel.ds_sequence_parallel_fpdt,
        chunk_size=parallel.ds_sequence_parallel_fpdt_chunk_size,
        offloading=parallel.ds_sequence_parallel_fpdt_offloading,
        device_memory_bytes=device_memory,
        host_memory_bytes=host_memory,
        checkpoint_interval=interval or 1,
        recompute=deepspeed.deepspeed_activation_checkpointing,
        checkpoint_in_cpu=deepspeed.checkpoint_in_cpu,
    )


def stream_shape(config: Config, context: Context) -> StreamShape:
    """What decides the size of a rank's chunks."""
    model = config.model
    return StreamShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_size=model.kv_channels,
        sequence_length=model.seq_length,
        batch_size=config.training.micro_batch_size,
        sequence_parallel_size=config.parallel.ds_sequence_parallel_size,
        element_size=context.dtype.itemsize,
    )
