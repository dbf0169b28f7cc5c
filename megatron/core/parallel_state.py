"""Parallel state: ranks and groups of a data parallel x sequence parallel world, as a value that is passed on.

Rank = data_parallel_rank * sequence_parallel_size + sequence_parallel_rank, so that the ranks of one sequence are
neighbors and their all-to-all stays inside a node where possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist


@dataclass(frozen=True)
class ParallelState:
    """One rank's place in the world. A group of this rank alone is None."""

    world_size: int = 1
    rank: int = 0
    sequence_parallel_size: int = 1
    sequence_parallel_rank: int = 0
    sequence_parallel_group: dist.ProcessGroup | None = None
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_group: dist.ProcessGroup | None = None

    @classmethod
    def create(cls, sequence_parallel_size: int = 1, timeout: timedelta | None = None) -> ParallelState:
        """Build the groups, whose collectives wait for `timeout`. Collective: every rank calls it once, same arguments.

        Without an initialized torch.distributed the world is this one process.
        """
        if not dist.is_initialized():
            world_size, rank = 1, 0
        else:
            world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size % sequence_parallel_size:
            raise ValueError(
                f"--ds-sequence-parallel-size ({sequence_parallel_size}) must divide the {world_size} ranks; "
                f"start a multiple of {sequence_parallel_size} processes or choose a divisor of {world_size}."
            )
        sp = sequence_parallel_size
        dp = world_size // sp
        sequences = [list(range(d * sp, (d + 1) * sp)) for d in range(dp)]
        sp_group = _own_group(rank, sequences, timeout, hidden_behind_compute=True)
        dp_group = _own_group(rank, [list(range(s, world_size, sp)) for s in range(sp)], timeout)
        return cls(world_size, rank, sp, rank % sp, sp_group, dp, rank // sp, dp_group)


def _own_group(
    rank: int, groups: list[list[int]], timeout: timedelta | None, hidden_behind_compute: bool = False
) -> dist.ProcessGroup | None:
    """Return the group of `rank`; every rank takes part in creating every group. Groups of one need no communicator."""
    own = None
    for ranks in groups:
        if len(ranks) == 1:
            continue
        options = _high_priority(timeout) if hidden_behind_compute and dist.get_backend() == "nccl" else None
        group = dist.new_group(ranks, timeout, pg_options=options)
        if rank in ranks:
            own = group
    return own


def _high_priority(timeout: timedelta | None) -> dist.ProcessGroupNCCL.Options:
    """Return options of a group whose kernels take the next free multiprocessors.

    Without priority, a collective that is started while a long kernel runs waits for the last blocks of that kernel.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if timeout is not None:
        options._timeout = timeout
    return options
