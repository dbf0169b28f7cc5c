"""Chunks on disk, written and read ahead through pinned host memory by threads of their own.

    copy-out stream   device -> piece of staging memory
    write thread      waits for that copy; piece -> file
    read thread       waits for the chunk's writes; file -> piece, ahead of need in the order that the block announces
    copy-in stream    piece -> device; queued by a thread as soon as the piece is read

The compute stream waits for the copies as it does with the host tier. The main thread waits in two cases: the disk has
not delivered a chunk by the time it is needed, or writes have filled the staging memory. An error of the disk is raised
by the next call of the main thread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron.fpdt.address_space import AddressSpace
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.disk_budget import DiskBudget, HostShare
from megatron.fpdt.disk_files import STRIPE_BYTES, DiskError, DiskFiles
from megatron.fpdt.staging import SHARE_AHEAD, Piece, Staging
from megatron.fpdt.stalls import Stalls
from megatron.fpdt.tiers import Arrival, CopyCounts, Event, HostTier, share_until_released

THREADS_PER_FOLDER = 8

T = TypeVar("T")


class _Part(NamedTuple):
    """The bytes of a chunk that lie in one stripe."""

    place: int
    start: int  # in the chunk
    num_bytes: int


# A copy to the device, done when it is queued; its event is None without CUDA.
_Copy = Future[torch.cuda.Event | None]


@dataclass
class _StagedPart:
    """A part of a chunk in staging memory, its read or write, and its last copy to the device."""

    part: _Part
    piece: Piece
    moved: Future[None]
    copy: _Copy | None = None


@dataclass
class _Arriving:
    """The copies of a chunk's parts to the device."""

    parts: list[_Copy]
    tier: DiskTier

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        """Make a stream wait for the chunk. Waits itself if the disk has not delivered it."""
        for part in self.parts:
            event = self.tier.result(part)
            if event is not None and stream is not None:
                stream.wait_event(event)


class DiskTier:
    """Chunks in files, behind the host tier whose copy streams they use."""

    def __init__(self, device: torch.device, host: HostTier, budget: DiskBudget, share: HostShare) -> None:
        self._device, self._host, self._share = device, host, share
        self._uses_streams = device.type == "cuda"
        self.files = DiskFiles(budget.folders, budget.file_bytes)
        self.staging = Staging(budget.staging_bytes, pinned=self._uses_streams)
        self.copied = CopyCounts()
        self._stalls = Stalls(device)
        self._space = AddressSpace(budget.file_bytes)
        threads = THREADS_PER_FOLDER * len(budget.folders)
        self._writers, self._readers, self._urgent = (
            self._threads(threads, name) for name in ("write", "read", "load")
        )
        # By address of a chunk.
        self._writing: dict[int, list[Future[None]]] = {}
        self._staged: dict[int, list[_StagedPart]] = {}
        self._reads_left: Counter[int] = Counter()  # that are announced
        self._upcoming: deque[Tensor] = deque()  # announced, not staged yet
        self._most_staged = int(self.staging.num_pieces * SHARE_AHEAD)
        self._num_staged = 0
        self._to_keep: set[int] = set()  # addresses

    def _threads(self, number: int, name: str) -> ThreadPoolExecutor:
        if not self._uses_streams:
            return ThreadPoolExecutor(number, f"disk-{name}")
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return ThreadPoolExecutor(number, f"disk-{name}", torch.cuda.set_device, (index,))

    @property
    def stalled_seconds(self) -> float:
        """Time in which the device had no work because the main thread waited for the disk."""
        return self._stalls.seconds

    @property
    def used_bytes(self) -> int:
        """Bytes of all chunks here."""
        return self._space.used_bytes

    @property
    def peak_used_bytes(self) -> int:
        """The most bytes of chunks here at once."""
        return self._space.peak_used_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes reserved for chunks."""
        return self._space.num_bytes

    def has_room(self, num_bytes: int, kind: ChunkKind) -> bool:
        return self._space.has_room(num_bytes)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, kind: ChunkKind) -> Tensor:
        try:
            tensor = self._space.empty(shape, dtype)
        except MemoryError as error:
            raise DiskError(
                f"the chunks do not fit the space reserved on disk: {error}; raise "
                "--ds-sequence-parallel-fpdt-disk-memory or --ds-sequence-parallel-fpdt-host-memory"
            ) from error
        share_until_released(tensor, self._share.add_on_disk, kind)
        first = tensor.data_ptr()
        for address in [each for each in (*self._writing, *self._staged) if first <= each < first + tensor.nbytes]:
            self._forget(address)
        return tensor

    def owns(self, chunk: Tensor) -> bool:
        return self._space.owns(chunk)

    def copy_out(self, chunk: Tensor, value: Tensor) -> Event:
        """Start to copy a device tensor to staging memory, from where it is written."""
        self._raise_errors()
        self._forget(chunk.data_ptr())
        self.copied.bytes_out += chunk.nbytes
        address, source, event = chunk.data_ptr(), _as_bytes(value), None
        parts, staged = [*self._parts(chunk)], []
        keep = address in self._to_keep and self._num_staged + len(parts) <= self._most_staged
        for part in parts:
            piece = self._acquire()
            if piece.read is not None:
                self._host.copy_out_stream.wait_event(piece.read)
            event = self._host.copy_out(
                piece.memory[: part.num_bytes], source[part.start : part.start + part.num_bytes]
            )
            staged.append(_StagedPart(part, piece, self._writers.submit(self._write, part, piece, event, keep)))
        self._writing[address] = [each.moved for each in staged]
        if keep:
            self._to_keep.discard(address)
            self._staged[address] = staged
            self._num_staged += len(staged)
        return event

    def copy_in(self, chunk: Tensor) -> Arrival:
        self._raise_errors()
        address = chunk.data_ptr()
        arriving = torch.empty(chunk.shape, dtype=chunk.dtype, device=self._device)
        target, computed = _as_bytes(arriving), self._computed()
        arrived: list[_Copy]
        self._reads_left[address] -= self._reads_left[address] > 0
        staged = self._staged.get(address)
        if staged is None:
            arrived = [
                self._urgent.submit(self._read_to_device, part, target, computed, self._writing.get(address, ()))
                for part in self._parts(chunk)
            ]
            self.copied.bytes_in += chunk.nbytes
        else:
            is_last = not self._reads_left[address]
            for each in staged:
                each.copy = self._urgent.submit(self._to_device, each, target, computed)
            arrived = [each.copy for each in staged if each.copy is not None]
            if is_last:
                self._drop_staged(address)
        self._read_upcoming()
        return arriving, _Arriving(arrived, self)

    def read_ahead(self, chunks: Iterable[Tensor]) -> None:
        """Announce the chunks that will be copied in next, in this order, a chunk as often as it will be.

        They are read as far as there is staging memory, where a chunk stays until its last copy. What was announced
        before and is not now is dropped.
        """
        self._upcoming = deque(chunk for chunk in chunks if self.owns(chunk))
        self._reads_left = Counter(chunk.data_ptr() for chunk in self._upcoming)
        for address in self._staged.keys() - self._reads_left.keys():
            self._drop_staged(address)
        self._read_upcoming()

    def keep(self, chunks: Iterable[Tensor]) -> None:
        """Leave these chunks in staging memory, as far as there is room, when they have been written.

        They must be announced with the next call of `read_ahead`, or are dropped then.
        """
        self._to_keep = {chunk.data_ptr() for chunk in chunks if self.owns(chunk)}

    def result(self, future: Future[T]) -> T:
        """Wait for a transfer, and count the time that the device has no work meanwhile."""
        return future.result() if future.done() else self._stalls.during(future.result)

    def _read_upcoming(self) -> None:
        while self._upcoming:
            chunk = self._upcoming[0]
            address = chunk.data_ptr()
            if self._reads_left[address] and address not in self._staged:
                parts = [*self._parts(chunk)]
                if self._num_staged + len(parts) > self._most_staged or self.staging.num_free < len(parts):
                    return
                self.copied.bytes_in += chunk.nbytes
                self._staged[address] = [self._read_part(part, self._writing.get(address, ())) for part in parts]
                self._num_staged += len(parts)
            self._upcoming.popleft()

    def _read_part(self, part: _Part, after: Sequence[Future[None]]) -> _StagedPart:
        piece = self.staging.acquire()
        return _StagedPart(part, piece, self._readers.submit(self._read, part, piece, after))

    def _acquire(self) -> Piece:
        """Return a piece of staging memory for a write. Waits if the disk is slower than what it is to write."""
        return self.staging.acquire() if self.staging.num_free else self._stalls.during(self.staging.acquire)

    def _forget(self, address: int) -> None:
        """Prepare for other contents at an address: nothing of the former ones is written or read any longer."""
        self._drop_staged(address)
        self._reads_left.pop(address, None)
        for write in self._writing.pop(address, ()):
            self.result(write)

    def _drop_staged(self, address: int) -> None:
        staged = self._staged.pop(address, [])
        self._num_staged -= len(staged)
        for each in staged:
            (each.copy or each.moved).add_done_callback(partial(self._release_after, each.piece))

    def _raise_errors(self) -> None:
        """Forget the writes that are done; raise the error of one that failed. The oldest are first."""
        while self._writing:
            address = next(iter(self._writing))
            if not all(write.done() for write in self._writing[address]):
                return
            for write in self._writing.pop(address):
                write.result()

    def _parts(self, chunk: Tensor) -> Iterator[_Part]:
        first = self._space.place_of(chunk)
        place, end = first, first + chunk.nbytes
        while place < end:
            stop = min(end, (place // STRIPE_BYTES + 1) * STRIPE_BYTES)
            yield _Part(place, place - first, stop - place)
            place = stop

    def _computed(self) -> torch.cuda.Event | None:
        """Return the event of the compute queued so far, after which the memory of an arrival is free."""
        return torch.cuda.current_stream(self._device).record_event() if self._uses_streams else None

    # What the threads run.

    def _write(self, part: _Part, piece: Piece, copied: torch.cuda.Event | None, keep: bool) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self.files.write(part.place, piece.view(part.num_bytes))
        finally:
            if not keep:
                self.staging.release(Piece(piece.memory))

    def _read(self, part: _Part, piece: Piece, after: Sequence[Future[None]]) -> None:
        for write in after:
            write.result()
        if piece.read is not None:
            piece.read.synchronize()
        self.files.read(part.place, piece.view(part.num_bytes))

    def _read_to_device(
        self, part: _Part, target: Tensor, computed: torch.cuda.Event | None, after: Sequence[Future[None]]
    ) -> torch.cuda.Event | None:
        piece, copied = self.staging.acquire(), None
        try:
            self._read(part, piece, after)
            copied = self._copy(piece, part, target, computed)
        finally:
            self.staging.release(Piece(piece.memory, copied))
        return copied

    def _to_device(
        self, staged: _StagedPart, target: Tensor, computed: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        staged.moved.result()
        return self._copy(staged.piece, staged.part, target, computed)

    def _release_after(self, piece: Piece, last: Future[Any]) -> None:
        """Release a piece whose last read from disk, or copy to the device, is done or queued."""
        copied = None if last.exception() else last.result()
        self.staging.release(Piece(piece.memory, copied))

    def _copy(
        self, piece: Piece, part: _Part, target: Tensor, computed: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        memory = piece.memory[: part.num_bytes]
        with torch.inference_mode():  # or a target of inference mode could not be written to
            return self._host.copy_into(target[part.start : part.start + part.num_bytes], memory, computed)


class DiskTraffic(NamedTuple):
    """Bytes read and written, and how long the device had no work because of them."""

    num_bytes: int
    stalled_seconds: float


class DiskMeter:
    """The traffic of a disk tier since it was last asked for."""

    def __init__(self, tier: DiskTier | None) -> None:
        self._tier, self._before = tier, DiskTraffic(0, 0.0)

    def take(self) -> DiskTraffic | None:
        """Return the traffic since the last call; None without a disk."""
        if self._tier is None:
            return None
        copied, before = self._tier.copied, self._before
        self._before = now = DiskTraffic(copied.bytes_in + copied.bytes_out, self._tier.stalled_seconds)
        return DiskTraffic(now.num_bytes - before.num_bytes, now.stalled_seconds - before.stalled_seconds)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
