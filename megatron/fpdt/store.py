"""Chunks moving between the device and the tier where they rest: the host when offloading, else the device itself.

    copy-in stream    waits for the device memory to be free and the chunk to be stored; then copies
    compute stream    waits for the copy-in event when the chunk is needed
    copy-out stream   waits for the compute event that produced the chunk; then copies

The host never waits. Device memory is bounded by construction: a chunk that is copied in lives in memory allocated on
the compute stream, so it can be reused as soon as the arithmetic that reads it is queued, and the source of a
copy-out is held until the next of its kind is put, or until all are let go, when the compute stream is told to wait for
its copy. On a machine without CUDA the same code runs with copies that are over when they return.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron.core.ranges import COPY_IN, COPY_OUT, named_range
from megatron.fpdt.host_pool import HostPool


@dataclass
class CopyCounts:
    """What has travelled, in bytes."""

    bytes_in: int = 0
    bytes_out: int = 0


# A device tensor and the event of its copy to the host; None where copies are over when they return.
Leaving = tuple[Tensor, torch.cuda.Event] | None


class ChunkStore:
    """Where chunks rest, and how they come and go. One per model, for its life.

    With offloading, tensors rest on the device until they take up `device_budget_bytes`, and on the host from then on,
    up to `host_budget_bytes`.
    """

    def __init__(
        self,
        device: torch.device,
        offloading: bool,
        device_budget_bytes: int = 0,
        host_budget_bytes: int | None = None,
    ) -> None:
        self.device = device
        self.offloading = offloading
        self.device_budget_bytes = device_budget_bytes
        self.device_bytes = 0  # of tensors that rest on the device within the budget
        self.pool = HostPool(pinned=device.type == "cuda", budget_bytes=host_budget_bytes)
        self.copied = CopyCounts()
        self._uses_streams = device.type == "cuda"
        if self._uses_streams:
            self._copy_in = torch.cuda.Stream(device)
            self._copy_out = torch.cuda.Stream(device)
        self._stored: dict[int, torch.cuda.Event] = {}  # by host address: the chunk there is complete
        self._leaving: dict[tuple[torch.Size, torch.dtype], Leaving] = {}
        self._leaving_freely: list[Leaving] = []
        self._expected: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}  # by host address: sent for already

    def empty(self, shape: Sequence[int], dtype: torch.dtype, on_device: bool | None = None) -> Tensor:
        """An uninitialised tensor on the tier, whose chunks are then put and prefetched.

        `on_device` says where, whatever the budget: a gradient must be where autograd has seen its tensor.
        """
        if on_device is None:
            on_device = self._fits_on_device(prod(shape) * dtype.itemsize)
        if on_device:
            return self._counted_on_device(torch.empty(tuple(shape), dtype=dtype, device=self.device))
        return self._empty_on_host(shape, dtype)

    def save(self, value: Tensor) -> Tensor:
        """Store a contiguous device tensor as a chunk of its own. It must not be written to afterwards.

        Until `release_sent` it stays on the device too, however many there are.
        """
        if self._fits_on_device(value.nbytes):
            return self._counted_on_device(value)
        chunk = self._empty_on_host(value.shape, value.dtype)
        self._leaving_freely.append(self._send_out(chunk, value))
        return chunk

    def _fits_on_device(self, num_bytes: int) -> bool:
        return not self.offloading or self.device_bytes + num_bytes <= self.device_budget_bytes

    def _counted_on_device(self, tensor: Tensor) -> Tensor:
        if self.offloading:
            self.device_bytes += tensor.nbytes
            weakref.finalize(tensor.untyped_storage(), self._uncount_on_device, tensor.nbytes).atexit = False
        return tensor

    def _empty_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = self.pool.empty(tuple(shape), dtype)
        first = tensor.data_ptr()
        self._drop_expected([address for address in self._expected if first <= address < first + tensor.nbytes])
        if self._uses_streams:
            # A reused slab may still be read on behalf of its former tensor.
            self._copy_out.wait_stream(self._copy_in)
        return tensor

    def _uncount_on_device(self, num_bytes: int) -> None:
        self.device_bytes -= num_bytes

    def is_on_device(self, chunk: Tensor) -> bool:
        """Whether a tensor of the tier rests on the device."""
        return chunk.device.type == self.device.type and not self.pool.owns(chunk)

    def put(self, chunk: Tensor, value: Tensor) -> None:
        """Store a device tensor into a chunk of the tier. The value must not be written to afterwards."""
        if self.is_on_device(chunk):
            chunk.copy_(value)
            return
        leaving = self._send_out(chunk, value.contiguous())
        kind = (value.shape, value.dtype)
        if kind in self._leaving:
            self._wait_for(self._leaving.pop(kind))
        self._leaving[kind] = leaving

    def _send_out(self, chunk: Tensor, value: Tensor) -> Leaving:
        """Copy to the host; the source must be held until it has left."""
        self.copied.bytes_out += chunk.nbytes
        self._drop_expected([chunk.data_ptr()])
        if not self._uses_streams:
            with named_range(COPY_OUT):
                chunk.copy_(value)
            return None
        self._copy_out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copy_out), named_range(COPY_OUT):
            chunk.copy_(value, non_blocking=True)
            stored = self._copy_out.record_event()
        self._stored[chunk.data_ptr()] = stored
        return value, stored

    def release_sent(self) -> None:
        """Stop holding what was put or kept: the compute stream waits here until it has left."""
        for leaving in (*self._leaving.values(), *self._leaving_freely):
            self._wait_for(leaving)
        self._leaving.clear()
        self._leaving_freely.clear()

    def _wait_for(self, leaving: Leaving) -> None:
        if leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(leaving[1])

    def prefetch(self, groups: Iterable[Sequence[Tensor]], ahead: bool = True) -> Prefetch:
        """Iterate over groups of chunks as device tensors, the next group on its way while one is in use.

        With ahead=False the next group is sent for when `Prefetch.start` is called, so that it takes up device memory
        only from then on.
        """
        return Prefetch(self, groups, ahead)

    def expect(self, chunks: Iterable[Tensor]) -> None:
        """Send now for chunks that somebody else will ask for first: what a next block begins with.

        They are held until they are asked for, put anew, or until this is called again.
        """
        self._drop_expected(list(self._expected))
        self._expected = {chunk.data_ptr(): self._start(chunk) for chunk in chunks if not self.is_on_device(chunk)}

    def _drop_expected(self, addresses: Iterable[int]) -> None:
        """Drop what is expected from there: not before it has arrived, as its memory will be used again."""
        for address in addresses:
            if address in self._expected:
                self._finish(*self._expected.pop(address))

    def _start(self, chunk: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.is_on_device(chunk):
            return chunk, None
        expected = self._expected.pop(chunk.data_ptr(), None)
        if expected is not None and expected[0].shape == chunk.shape:
            return expected
        self.copied.bytes_in += chunk.nbytes
        if not self._uses_streams:
            with named_range(COPY_IN):
                return chunk.clone(), None
        if not chunk.is_contiguous():  # torch would copy it through memory that is not pinned
            chunk = chunk.contiguous().pin_memory()
        arriving = torch.empty(chunk.shape, dtype=chunk.dtype, device=self.device)
        self._copy_in.wait_stream(torch.cuda.current_stream(self.device))
        stored = self._stored.get(chunk.data_ptr())
        if stored is not None:
            self._copy_in.wait_event(stored)
        with torch.cuda.stream(self._copy_in), named_range(COPY_IN):
            arriving.copy_(chunk, non_blocking=True)
            return arriving, self._copy_in.record_event()

    def _finish(self, arriving: Tensor, arrived: torch.cuda.Event | None) -> Tensor:
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        return arriving


class Prefetch(Iterator[tuple[Tensor, ...]]):
    """Groups of chunks, one ahead. A group must have been `put` before the group before it is asked for.

    A group may also hold inputs that rest in pinned host memory: a copy on the compute stream would wait there for
    the large ones.

    On the device tier the tensors are the stored chunks themselves, so they may be written to only on the way to
    `put`ting them back.
    """

    def __init__(self, store: ChunkStore, groups: Iterable[Sequence[Tensor]], ahead: bool) -> None:
        self._store = store
        self._groups = iter(groups)
        self._always_ahead = ahead
        self._ahead: list[tuple[Tensor, torch.cuda.Event | None]] | None = None

    def start(self) -> None:
        """Send for the next group now, where nothing is on its way yet."""
        if self._ahead is None:
            group = next(self._groups, None)
            self._ahead = None if group is None else [self._store._start(chunk) for chunk in group]

    def __next__(self) -> tuple[Tensor, ...]:
        self.start()
        if self._ahead is None:
            raise StopIteration
        arriving, self._ahead = self._ahead, None
        if self._always_ahead:
            self.start()
        return tuple(self._store._finish(*item) for item in arriving)
