"""From the configuration and the machine to how the model is executed."""

from __future__ import annotations

from megatron.config import Config, ConfigError
from megatron.fpdt.memory_model import StreamShape, choose_what_is_kept, longest_sequence
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
        _refuse_what_the_host_cannot_hold(shape, shape.tier_bytes(interval, recompute), budget, asked is None)
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


def _refuse_what_the_host_cannot_hold(shape: StreamShape, needed: int, budget: int, is_what_is_free: bool) -> None:
    if needed <= budget:
        return
    thriftiest = min(map(shape.tier_bytes, range(1, shape.num_layers + 1)))
    longest = longest_sequence(shape, budget)
    if thriftiest <= budget:
        advice = (
            "leave out --ds-sequence-parallel-fpdt-recompute and --ds-sequence-parallel-fpdt-checkpoint-interval, so "
            "that they are chosen to fit"
        )
    else:
        shorter = f"use --seq-length {longest} or less, " if longest else ""
        size = shape.layout.sequence_parallel_size
        advice = f"{shorter}raise --ds-sequence-parallel-size ({size}), or see tools/plan_context.py for what would fit"
    whose = "are free for a rank here" if is_what_is_free else "may be used (--ds-sequence-parallel-fpdt-host-memory)"
    raise ConfigError(
        f"the chunks of --seq-length ({shape.layout.sequence_length}) take up {needed / GIB:.3g} GiB of memory per "
        f"rank, and {budget / GIB:.3g} GiB {whose}; {advice}"
    )
