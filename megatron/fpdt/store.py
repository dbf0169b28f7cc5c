"""Copies of chunks between the device and the tier that stores them: the host when offloading, else the device itself.

With a disk behind the host, some of the chunks are stored there. The host never waits, except for a disk that is slow.
Device memory is bounded by construction. A chunk that is copied in lives in memory allocated on the compute stream, so
that memory can be reused as soon as the compute that reads it is queued. The source of a copy-out is held until the
next chunk of its kind is put, or until all are released; the compute stream then waits for its copy. How chunks are
copied, and on which streams, is in megatron.fpdt.tiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from megatron.fpdt.device_budget import NO_DEVICE_MEMORY, ChunkKind, DeviceBudget
from megatron.fpdt.disk_budget import DiskBudget, HostShare
from megatron.fpdt.disk_tier import DiskTier
from megatron.fpdt.tiers import Arrival, Arriving, CopyCounts, DeviceTier, HostTier, Tier

# A copy-out: the device tensor, held until the compute stream waits for the event of its copy.
CopyOut = tuple[Tensor, torch.cuda.Event]


class ChunkStore:
    """Stores chunks on the tier, offloads them and prefetches them. One per model, for its lifetime.

    With offloading, tensors are stored on the device as far as the `device_budget` has room for their kind, and else on
    the host, up to `host_budget_bytes`, and on `disk`.
    """

    def __init__(
        self,
        device: torch.device,
        offloading: bool,
        device_budget: DeviceBudget = NO_DEVICE_MEMORY,
        host_budget_bytes: int | None = None,
        disk: DiskBudget | None = None,
    ) -> None:
        self.device = device
        self.offloading = offloading
        self.copied = CopyCounts()
        self.device_tier = DeviceTier(device, device_budget if offloading else None)
        share = None if disk is None else HostShare(host_budget_bytes or 0, disk)
        self.host_tier = HostTier(device, host_budget_bytes, share)
        self.disk_tier = None if disk is None or share is None else DiskTier(device, self.host_tier, disk, share)
        self.pool = self.host_tier.pool
        # Fastest first; the last takes what the others have no room for.
        tiers = (self.host_tier, self.disk_tier)
        self.offload_tiers: tuple[Tier, ...] = tuple(tier for tier in tiers if tier is not None)
        self._copying_out: dict[tuple[torch.Size, torch.dtype], CopyOut] = {}
        self._copying_out_saved: list[CopyOut] = []
        self._expected: dict[int, Arrival] = {}  # by host address: copies in flight

    @property
    def pinned_bytes(self) -> int:
        """Host memory of chunks, and of what is on its way to the disk and back."""
        return self.pool.allocated_bytes + (0 if self.disk_tier is None else self.disk_tier.staging.num_bytes)

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        kind: ChunkKind = ChunkKind.HIDDEN_STATES,
        on_device: bool | None = None,
    ) -> Tensor:
        """Return an uninitialized tensor on the tier, whose chunks are then put and prefetched.

        `on_device` overrides the budget: a gradient must be on the device on which autograd has seen its tensor.
        """
        if on_device is None:
            on_device = self.device_tier.has_room(prod(shape) * dtype.itemsize, kind)
        if on_device:
            return self.device_tier.empty(shape, dtype, kind)
        return self._empty_offloaded(shape, dtype, kind)

    def add(self, value: Tensor, kind: ChunkKind) -> Tensor:
        """Store a device tensor as a chunk of its own: the tensor itself if it stays on the device, else as `put` does.

        It must not be written to afterwards.
        """
        if self.device_tier.has_room(value.nbytes, kind):
            return self.device_tier.adopt(value, kind)
        chunk = self._empty_offloaded(value.shape, value.dtype, kind)
        self.put(chunk, value)
        return chunk

    def save(self, value: Tensor, kind: ChunkKind = ChunkKind.HIDDEN_STATES) -> Tensor:
        """Store a contiguous device tensor as `add` does, but until `release_sent` hold it and all others."""
        if self.device_tier.has_room(value.nbytes, kind):
            return self.device_tier.adopt(value, kind)
        chunk = self._empty_offloaded(value.shape, value.dtype, kind)
        copy_out = self._send_out(self._tier_of(chunk), chunk, value)
        if copy_out is not None:
            self._copying_out_saved.append(copy_out)
        return chunk

    def save_on_device(self, values: Sequence[Tensor], kind: ChunkKind) -> list[Tensor]:
        """Store contiguous device tensors as chunks that stay on the device; none of them if it lacks the room."""
        if not self.device_tier.has_room(sum(value.nbytes for value in values), kind):
            return []
        return [self.device_tier.adopt(value, kind) for value in values]

    def _empty_offloaded(self, shape: Sequence[int], dtype: torch.dtype, kind: ChunkKind) -> Tensor:
        num_bytes = prod(shape) * dtype.itemsize
        tier = next((tier for tier in self.offload_tiers if tier.has_room(num_bytes, kind)), None)
        if tier is None:  # a full disk, with buffers on the host that sequences of another length have left
            tier = self.host_tier if self.host_tier.can_make_room(num_bytes) else self.offload_tiers[-1]
        tensor = tier.empty(shape, dtype, kind)
        if self._expected:
            first = tensor.data_ptr()
            self._drop_expected([address for address in self._expected if first <= address < first + tensor.nbytes])
        return tensor

    def _tier_of(self, chunk: Tensor) -> Tier:
        if self.disk_tier is not None and self.disk_tier.owns(chunk):  # the host tier takes any CPU tensor for its own
            return self.disk_tier
        for tier in self.offload_tiers:
            if tier.owns(chunk):
                return tier
        return self.device_tier

    def is_on_device(self, chunk: Tensor) -> bool:
        """Whether a tensor of the tier is stored on the device."""
        return self._tier_of(chunk) is self.device_tier

    def put(self, chunk: Tensor, value: Tensor) -> None:
        """Store a device tensor into a chunk of the tier. The value must not be written to afterwards."""
        tier = self._tier_of(chunk)
        if tier is self.device_tier:
            tier.copy_out(chunk, value)
            return
        copy_out = self._send_out(tier, chunk, value.contiguous())
        if copy_out is None:
            return
        kind = (value.shape, value.dtype)
        if kind in self._copying_out:
            self._wait_for(self._copying_out.pop(kind)[1])
        self._copying_out[kind] = copy_out

    def _send_out(self, tier: Tier, chunk: Tensor, value: Tensor) -> CopyOut | None:
        """Start the copy out. Return what must be held until it is over, if it is not over yet."""
        self.copied.bytes_out += chunk.nbytes
        if self._expected:
            self._drop_expected([chunk.data_ptr()])
        event = tier.copy_out(chunk, value)
        return None if event is None else (value, event)

    def release_sent(self) -> None:
        """Release the sources of all copy-outs: the compute stream waits until the copies are over."""
        for copy_out in (*self._copying_out.values(), *self._copying_out_saved):
            self._wait_for(copy_out[1])
        self._copying_out.clear()
        self._copying_out_saved.clear()

    def _wait_for(self, copy: Arriving | None) -> None:
        """Make the compute stream wait for a copy."""
        if copy is not None:
            copy.wait(torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None)

    def prefetch(self, groups: Iterable[Sequence[Tensor]], ahead: bool = True) -> Prefetch:
        """Iterate over groups of chunks as device tensors, the next group prefetched while one is in use.

        With ahead=False the next group is prefetched when `Prefetch.start` is called, so that it uses device memory
        only from then on.
        """
        return Prefetch(self, groups, ahead)

    def read_ahead(self, chunks: Iterable[Tensor]) -> None:
        """Announce the chunks that will be prefetched next, in this order, so that those on disk are read in time."""
        if self.disk_tier is None:
            return
        arriving = set(self._expected)  # their first copies have been started
        announced = []
        for chunk in chunks:
            if chunk.data_ptr() in arriving:
                arriving.remove(chunk.data_ptr())
            else:
                announced.append(chunk)
        self.disk_tier.read_ahead(announced)

    def keep_ahead(self, chunks: Iterable[Tensor]) -> None:
        """Announce chunks that are put now and that the next call of `read_ahead` announces first."""
        if self.disk_tier is not None:
            self.disk_tier.keep(chunks)

    def expect(self, chunks: Iterable[Tensor]) -> None:
        """Prefetch now the chunks that a later `Prefetch` will begin with: the first chunks of the next block.

        They are held until they are asked for or put again, or until the next call of `expect` that leaves them out.
        """
        expected = {chunk.data_ptr(): self._start(chunk) for chunk in chunks if not self.is_on_device(chunk)}
        self._drop_expected(list(self._expected))
        self._expected = expected

    def _drop_expected(self, addresses: Iterable[int]) -> None:
        """Drop the expected chunks at these addresses once their copies are over, as the memory will be reused."""
        for address in addresses:
            if address in self._expected:
                self._finish(*self._expected.pop(address))

    def _start(self, chunk: Tensor) -> Arrival:
        tier = self._tier_of(chunk)
        if tier is self.device_tier:
            return tier.copy_in(chunk)
        expected = self._expected.pop(chunk.data_ptr(), None)
        if expected is not None and expected[0].shape == chunk.shape:
            return expected
        self.copied.bytes_in += chunk.nbytes
        return tier.copy_in(chunk)

    def _finish(self, arriving: Tensor, arrived: Arriving | None) -> Tensor:
        self._wait_for(arrived)
        return arriving


class Prefetch(Iterator[tuple[Tensor, ...]]):
    """Double-buffered groups of chunks: one in use, one prefetched.

    A group must have been `put` before the previous group is asked for. A group may also hold inputs in pinned host
    memory, as their copies on the compute stream would wait for the large ones.

    On the device tier the tensors are the stored chunks themselves, so they may be written to only in order to `put`
    them back.
    """

    def __init__(self, store: ChunkStore, groups: Iterable[Sequence[Tensor]], ahead: bool) -> None:
        self._store = store
        self._groups = iter(groups)
        self._always_ahead = ahead
        self._ahead: list[Arrival] | None = None

    def start(self) -> None:
        """Prefetch the next group now, unless it is already being prefetched."""
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
