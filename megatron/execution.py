"""From the configuration and the machine to how the model is executed."""

from __future__ import annotations

import torch

from megatron.config import Config, ModelConfig
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.memory_model import StreamShape, choose_what_is_kept
from megatron.fpdt.stream import SLICE_LENGTH
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
        shape = stream_shape(
            config.model,
            parallel.ds_sequence_parallel_fpdt_chunk_size,
            parallel.ds_sequence_parallel_size,
            config.training.micro_batch_size,
            context.dtype,
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


def stream_shape(
    model: ModelConfig, chunk_size: int, sequence_parallel_size: int, batch_size: int, dtype: torch.dtype
) -> StreamShape:
    """What decides the size of a rank's chunks."""
    return StreamShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        mlp_outputs=model.ffn_hidden_size * (2 if model.swiglu else 1),
        mlp_width=model.ffn_hidden_size,
        num_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_size=model.kv_channels,
        layout=SequenceLayout(model.seq_length, min(chunk_size, model.seq_length), sequence_parallel_size),
        slice_length=SLICE_LENGTH,
        batch_size=batch_size,
        element_size=dtype.itemsize,
    )
