"""Batch sizes derived from the settings and the number of ranks.

data-parallel size   = ranks / sequence-parallel size
accumulation steps   = global batch / (micro batch x data-parallel size)
"""

from megatron.config.config import Config


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the number of sequence-parallel groups, each of which trains on its own sequences."""
    return world_size // config.parallel.ds_sequence_parallel_size


def global_batch_size(config: Config, world_size: int) -> int:
    """Return the sequences per optimizer step."""
    if config.training.global_batch_size is not None:
        return config.training.global_batch_size
    return config.training.micro_batch_size * data_parallel_size(config, world_size)


def accumulation_steps(config: Config, world_size: int) -> int:
    """Return the micro batches whose gradients each rank accumulates per optimizer step."""
    per_pass = config.training.micro_batch_size * data_parallel_size(config, world_size)
    return global_batch_size(config, world_size) // per_pass


def default_batch_notes(config: Config, world_size: int) -> tuple[str, ...]:
    """Return a log line with the global batch size where it is derived from the number of ranks."""
    if config.training.global_batch_size is not None:
        return ()
    batch, groups = global_batch_size(config, world_size), data_parallel_size(config, world_size)
    return (
        f"--global-batch-size is not given: {batch}, --micro-batch-size ({config.training.micro_batch_size}) x the "
        f"data-parallel size ({groups}), which changes with the number of ranks",
    )
