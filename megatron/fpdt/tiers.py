"""Storage tiers of chunks: where their tensors are allocated, and how chunks move to and from the compute device.

    copy-in stream    waits for the device memory to be free and the chunk to be stored; then copies
    compute stream    waits for the copy-in event when the chunk is needed
    copy-out stream   waits for the compute event that produced the chunk; then copies

The tiers are the only code that knows the copy streams. On a machine without CUDA the same code runs with synchronous
copies. A copy's event is None if nothing has to be waited for. megatron.fpdt.disk_tier stores chunks on disk.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.core.ranges import COPY_IN, COPY_OUT, named_range
from megatron.fpdt.device_budget import ChunkKind, DeviceBudget, DeviceUse
from megatron.fpdt.disk_budget import BUSY_KINDS, HostShare
from megatron.fpdt.host_pool import HostPool

Event = torch.cuda.Event | None


class Arriving(Protocol):
    """A copy to the device that may be under way: a CUDA event, for example."""

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        """Make a stream wait for the copy. There is none on a machine without CUDA."""
        ...


# A chunk on its way to the device: the device tensor, and its copy.
Arrival = tuple[Tensor, Arriving | None]


@dataclass
class CopyCounts:
    """Bytes copied in and out."""

    bytes_in: int = 0
    bytes_out: int = 0


def share_until_released(tensor: Tensor, add: Callable[[int, ChunkKind], None], kind: ChunkKind) -> None:
    """Count a tensor for as long as anything references its storage."""
    add(tensor.nbytes, kind)
    weakref.finalize(tensor.untyped_storage(), add, -tensor.nbytes, kind).atexit = False


class Tier(Protocol):
    """The interface of a storage tier."""

    def has_room(self, num_bytes: int, kind: ChunkKind) -> bool:
        """Whether a tensor of this size and kind fits the budget of the tier."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype, kind: ChunkKind) -> Tensor:
        """Return an uninitialized tensor, whose chunks are then copied out and in."""
        ...

    def owns(self, chunk: Tensor) -> bool:
        """Whether this tier moves the chunk."""
        ...

    def copy_in(self, chunk: Tensor) -> Arrival:
        """Start to copy a chunk to the device."""
        ...

    def copy_out(self, chunk: Tensor, value: Tensor) -> Event:
        """Start to copy a contiguous device tensor, held until the compute stream waits for the event, to a chunk."""
        ...


class DeviceTier:
    """Chunks that are stored on the compute device itself; only with a budget are their bytes counted."""

    def __init__(self, device: torch.device, budget: DeviceBudget | None = None) -> None:
        self._device = device
        self._use = None if budget is None else DeviceUse(budget)

    @property
    def budget(self) -> DeviceBudget | None:
        """The budget of the next chunks."""
        return None if self._use is None else self._use.budget

    def limit(self, budget: DeviceBudget) -> None:
        """Give the next chunks another budget, in which those stored so far count."""
        if self._use is not None:
            self._use.budget = budget

    @property
    def used_bytes(self) -> int:
        """Bytes of all chunks here; 0 if they are not counted."""
        return 0 if self._use is None else self._use.total_bytes

    def has_room(self, num_bytes: int, kind: ChunkKind) -> bool:
        return self._use is None or self._use.has_room(num_bytes, kind)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, kind: ChunkKind) -> Tensor:
        return self.adopt(torch.empty(tuple(shape), dtype=dtype, device=self._device), kind)

    def adopt(self, tensor: Tensor, kind: ChunkKind) -> Tensor:
        """Make a device tensor a chunk of this tier, for as long as anything references its storage.

        A strided tensor, or a part of another, is copied: the chunk references no more memory than its own.
        """
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if self._use is not None:
            share_until_released(tensor, self._use.add, kind)
        return tensor

    def owns(self, chunk: Tensor) -> bool:
        return chunk.device.type == self._device.type

    def copy_in(self, chunk: Tensor) -> Arrival:
        """Return the stored chunk itself."""
        return chunk, None

    def copy_out(self, chunk: Tensor, value: Tensor) -> Event:
        chunk.copy_(value)
        return None


class HostTier:
    """Chunks in pinned host memory; those of its share, if there is a disk behind it."""

    def __init__(self, device: torch.device, budget_bytes: int | None = None, share: HostShare | None = None) -> None:
        self._device, self._share = device, share
        self.pool = HostPool(pinned=device.type == "cuda", budget_bytes=budget_bytes)
        self._uses_streams = device.type == "cuda"
        if self._uses_streams:
            self.copy_in_stream = torch.cuda.Stream(device)
            self.copy_out_stream = torch.cuda.Stream(device)
            self._computed = torch.cuda.Event()  # recorded for every copy, as a wait is for the last record before it
        self._stored: dict[int, torch.cuda.Event] = {}  # by host address: when the copy-out of the chunk there ends
        self._read: dict[int, torch.cuda.Event] = {}  # by address of the slab: when its last copy-in ends

    def has_room(self, num_bytes: int, kind: ChunkKind) -> bool:
        if self._share is None:
            return self.can_make_room(num_bytes)
        if not self._share.host_has_room(num_bytes, kind):
            return False
        # Buffers of other sizes are freed, and others pinned, only for what is copied most.
        return kind in BUSY_KINDS or self.pool.has_room(num_bytes)

    def can_make_room(self, num_bytes: int) -> bool:
        """Whether a tensor fits the budget if unused buffers are freed for it."""
        budget = self.pool.budget_bytes
        return budget is None or self.pool.used_bytes + num_bytes <= budget

    def empty(self, shape: Sequence[int], dtype: torch.dtype, kind: ChunkKind) -> Tensor:
        tensor = self.pool.empty(tuple(shape), dtype)
        if self._share is not None:
            share_until_released(tensor, self._share.add_on_host, kind)
        read = self._read.pop(tensor.data_ptr(), None)
        if read is not None:  # a copy-in of the slab's previous tensor may still be under way
            self.copy_out_stream.wait_event(read)
        return tensor

    def owns(self, chunk: Tensor) -> bool:
        """Whether the chunk is in the pool, or an input in host memory while the device is another."""
        return chunk.device.type != self._device.type or self.pool.owns(chunk)

    def copy_in(self, chunk: Tensor) -> Arrival:
        if not self._uses_streams:
            with named_range(COPY_IN):
                return chunk.clone(), None
        if not chunk.is_contiguous():  # torch would copy it through memory that is not pinned
            chunk = chunk.contiguous().pin_memory()
        arriving = torch.empty(chunk.shape, dtype=chunk.dtype, device=self._device)
        self._wait_for_compute(self.copy_in_stream)
        stored = self._stored.get(chunk.data_ptr())
        if stored is not None:
            self.copy_in_stream.wait_event(stored)
        with self.copy_in_stream, named_range(COPY_IN):
            arriving.copy_(chunk, non_blocking=True)
        arrived = self.copy_in_stream.record_event()
        if self.pool.owns(chunk):
            self._read[chunk.untyped_storage().data_ptr()] = arrived
        return arriving, arrived

    def copy_into(self, target: Tensor, source: Tensor, computed: Event) -> Event:
        """Start to copy pinned memory to a device tensor, whose memory is free after `computed`. For any thread."""
        if computed is None:
            target.copy_(source)
            return None
        # Not `with self.copy_in_stream`, which is not safe for several threads.
        with torch.cuda.stream(self.copy_in_stream), named_range(COPY_IN):
            self.copy_in_stream.wait_event(computed)
            target.copy_(source, non_blocking=True)
            return self.copy_in_stream.record_event()

    def copy_out(self, chunk: Tensor, value: Tensor) -> Event:
        if not self._uses_streams:
            with named_range(COPY_OUT):
                chunk.copy_(value)
            return None
        self._wait_for_compute(self.copy_out_stream)
        with self.copy_out_stream, named_range(COPY_OUT):
            chunk.copy_(value, non_blocking=True)
        stored = self._stored[chunk.data_ptr()] = self.copy_out_stream.record_event()
        return stored

    def _wait_for_compute(self, stream: torch.cuda.Stream) -> None:
        """Make a copy stream wait for the compute queued so far."""
        self._computed.record(torch.cuda.current_stream(self._device))
        stream.wait_event(self._computed)
