"""Work that succeeds on every rank or raises on every rank, so that no rank waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.checkpointing.errors import CheckpointError
from megatron.weights.errors import WeightsError, first_line

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Do the work on each rank; return the results of all ranks, in rank order. Collective over all ranks.

    Raises CheckpointError on every rank, with the first failing rank's message, where any rank failed. No rank
    continues before all of them are done, as after a barrier.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # of any kind: the other ranks must get it
        failure = error
    is_one_line = isinstance(failure, CheckpointError | WeightsError)
    message = None if failure is None else str(failure) if is_one_line else first_line(failure)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, message))
    for _, message_of_rank in outcomes:
        if message_of_rank is not None:
            raise CheckpointError(message_of_rank) from failure
    return [result_of_rank for result_of_rank, _ in outcomes]


def on_first_rank(work: Callable[[], T]) -> T:
    """Do the work on rank 0 alone; return its result on every rank. Collective; raises like `on_all_ranks`."""
    results: list[Any] = on_all_ranks(lambda: work() if dist.get_rank() == 0 else None)
    return results[0]
