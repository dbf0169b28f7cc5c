"""Work that succeeds on every rank or is an error on every rank, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.checkpointing.errors import CheckpointError
from megatron.weights.errors import WeightsError, first_line

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Do the work on each rank; returns every rank's result, in their order. Collective over all ranks.

    Raises CheckpointError on every rank, with the first failing rank's words, where any of them failed. No rank goes
    on before all of them are through, as after a barrier.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    is_one_line = isinstance(failure, CheckpointError | WeightsError)
    words = None if failure is None else str(failure) if is_one_line else first_line(failure)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, words))
    for _, words_of_rank in outcomes:
        if words_of_rank is not None:
            raise CheckpointError(words_of_rank) from failure
    return [result_of_rank for result_of_rank, _ in outcomes]


def on_first_rank(work: Callable[[], T]) -> T:
    """Do the work on rank 0 alone; its result on every rank. Collective over all ranks, raises like `on_all_ranks`."""
    results: list[Any] = on_all_ranks(lambda: work() if dist.get_rank() == 0 else None)
    return results[0]
