"""Chunks moving between the device and the tier where they rest: the host when offloading, else the device itself.

    copy-in stream    waits for the device memory to be free and the chunk to be stored; then copies
    compute stream    waits for the copy-in event when the chunk is needed
    copy-out stream   waits for the compute event that produced the chunk; then copies

The host never waits. Device memory is bounded by construction: a chunk that is copied in lives in memory allocated on
the compute stream, so it can be reused as soon as the arithmetic that reads it is queued, and the source of a
copy-out is held until the next of its kind is put, when the compute stream is told to wait for its copy. On a machine
without CUDA the same code runs with copies that are over when they return.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron.fpdt.host_pool import HostPool


@dataclass
class CopyCounts:
    """What has travelled, in bytes."""

    bytes_in: int = 0
    bytes_out: int = 0


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
        self._leaving: dict[tuple[torch.Size, torch.dtype], tuple[Tensor, torch.cuda.Event]] = {}
        self._expected: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}  # by host address: sent for already

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the tier, whose chunks are then `put` and `get`."""
        if not self.offloading:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        num_bytes = prod(shape) * dtype.itemsize
        if self.device_bytes + num_bytes <= self.device_budget_bytes:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
            self.device_bytes += num_bytes
            weakref.finalize(tensor.untyped_storage(), self._leave_device, num_bytes).atexit = False
            return tensor
        tensor = self.pool.empty(tuple(shape), dtype)
        first = tensor.data_ptr()
        self._give_up([address for address in self._expected if first <= address < first + num_bytes])
        if self._uses_streams:
            # A reused slab may still be read on behalf of its former tensor.
            self._copy_out.wait_stream(self._copy_in)
        return tensor

    def _leave_device(self, num_bytes: int) -> None:
        self.device_bytes -= num_bytes

    def _is_on_device(self, chunk: Tensor) -> bool:
        return chunk.device.type == self.device.type and not self.pool.owns(chunk)

    def put(self, chunk: Tensor, value: Tensor) -> None:
        """Store a device tensor into a chunk of the tier. The value must not be written to afterwards."""
        if self._is_on_device(chunk):
            chunk.copy_(value)
            return
        self.copied.bytes_out += chunk.nbytes
        self._give_up([chunk.data_ptr()])
        if not self._uses_streams:
            chunk.copy_(value)
            return
        value = value.contiguous()
        self._copy_out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copy_out):
            chunk.copy_(value, non_blocking=True)
            stored = self._copy_out.record_event()
        self._stored[chunk.data_ptr()] = stored
        kind = (value.shape, value.dtype)
        self._let_go([kind])
        self._leaving[kind] = (value, stored)

    def let_go(self) -> None:
        """Stop holding what was put, of any kind: the compute stream waits here until it has left."""
        self._let_go(list(self._leaving))

    def _let_go(self, kinds: Iterable[tuple[torch.Size, torch.dtype]]) -> None:
        for kind in kinds:
            if kind in self._leaving:
                _, left = self._leaving.pop(kind)
                torch.cuda.current_stream(self.device).wait_event(left)

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
        self._give_up(list(self._expected))
        self._expected = {chunk.data_ptr(): self._start(chunk) for chunk in chunks if not self._is_on_device(chunk)}

    def _give_up(self, addresses: Iterable[int]) -> None:
        """Drop what is expected from there: not before it has arrived, as its memory will be used again."""
        for address in addresses:
            if address in self._expected:
                self._finish(*self._expected.pop(address))

    def _start(self, chunk: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._is_on_device(chunk):
            return chunk, None
        expected = self._expected.pop(chunk.data_ptr(), None)
        if expected is not None and expected[0].shape == chunk.shape:
            return expected
        self.copied.bytes_in += chunk.nbytes
        if not self._uses_streams:
            return chunk.clone(), None
        if not chunk.is_contiguous():  # torch would copy it through memory that is not pinned
            chunk = chunk.contiguous().pin_memory()
        arriving = torch.empty(chunk.shape, dtype=chunk.dtype, device=self.device)
        self._copy_in.wait_stream(torch.cuda.current_stream(self.device))
        stored = self._stored.get(chunk.data_ptr())
        if stored is not None:
            self._copy_in.wait_event(stored)
        with torch.cuda.stream(self._copy_in):
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
