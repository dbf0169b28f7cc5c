"""A process group that simulates one rank of several on a single device, without the other processes.

A collective returns as if every other rank had called it with this rank's tensors: an all-gather repeats the shard, a
sum multiplies, an all-to-all repeats the part for this rank. The copies are made on the device, on the calling stream.
So one process stores, computes and copies as much as one rank of many, on numbers as random as real ones. Only the
network time is missing; `received_bytes` counts the bytes that it would have carried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "loopback"
_ProcessGroup: Any = dist.ProcessGroup  # its stubs require every overload of each method


class LoopbackGroup(_ProcessGroup):  # type: ignore[misc]
    """Rank `rank` of `size` ranks; all other ranks are simulated as copies of it."""

    received_bytes = 0
    """Bytes that all groups of this process would have received from other ranks, with ring algorithms."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> dist.Work:
        for tensor in tensors:
            self._reduce(tensor, options.reduceOp)
            self._count(2 * tensor.nbytes // self._size)
        return _Queued(tensors)

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> dist.Work:
        for tensor in tensors:
            self._count(tensor.nbytes // self._size)
        return _Queued(tensors)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], options: Any) -> dist.Work:
        for copies, tensor in zip(outputs, tensors, strict=True):
            for copy in copies:
                copy.copy_(tensor)
            self._count(tensor.nbytes)
        return _Queued(tensors)

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> dist.Work:
        for part in self._parts(output):
            if part.data_ptr() != tensor.data_ptr():  # the shard may be in place already
                part.copy_(tensor.view(-1))
        self._count(tensor.nbytes)
        return _Queued([output])

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, options: Any) -> dist.Work:
        output.view(-1).copy_(self._parts(tensor)[self._rank])
        self._reduce(output, options.reduceOp)
        self._count(output.nbytes)
        return _Queued([output])

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_sizes: Sequence[int], sizes: Sequence[int], options: Any
    ) -> dist.Work:
        if output_sizes or sizes:
            raise NotImplementedError("an all-to-all of unequal parts")
        self._parts(output).copy_(self._parts(tensor)[self._rank])
        self._count(tensor.nbytes // self._size)
        return _Queued([output])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], options: Any = None
    ) -> dist.Work:
        return [self.all_gather_single(*pair) for pair in zip(outputs, tensors, strict=True)][-1]

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], options: Any
    ) -> dist.Work:
        return [self.reduce_scatter_single(*pair, options) for pair in zip(outputs, tensors, strict=True)][-1]

    def barrier(self, opts: Any) -> dist.Work:
        return _Queued([])

    def _start_coalescing(self, device: torch.device) -> None: ...

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        return _Queued([])

    # Their names up to torch 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _parts(self, tensor: Tensor) -> Tensor:
        return tensor.view(self._size, -1)

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        """Reduce `size` equal values: only a sum changes them."""
        if operation == dist.ReduceOp.SUM:
            tensor.mul_(self._size)
        elif not any(operation == each for each in (dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.AVG)):
            raise NotImplementedError(f"a reduction by {operation}")

    def _count(self, num_bytes_per_rank: int) -> None:
        LoopbackGroup.received_bytes += num_bytes_per_rank * (self._size - 1)


class _Queued(dist.Work):
    """Work queued on the calling stream; `wait` makes the current stream wait for it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._end = torch.cuda.current_stream().record_event() if any(t.is_cuda for t in tensors) else None

    def wait(self, timeout: Any = None) -> bool:
        if self._end is not None:
            torch.cuda.current_stream().wait_event(self._end)
        return True

    def is_completed(self) -> bool:
        return self._end is None or self._end.query()


def init_loopback(world_size: int, rank: int = 0) -> None:
    """Initialize torch.distributed with `world_size` ranks: this process is one, the others are simulated."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(
            BACKEND, lambda store, rank, size, timeout: LoopbackGroup(rank, size), devices=["cpu", "cuda"]
        )
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
