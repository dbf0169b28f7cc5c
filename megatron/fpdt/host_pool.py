"""Pool of pinned host memory for chunks: slabs of exactly the requested size, pinned once and reused.

torch's pinned allocator rounds every allocation up to a power of two, and pinning a fresh GiB takes about 0.7 s. A slab
here is an anonymous memory map, in huge pages where the system has them, as there are fewer to pin. It is registered
with CUDA if there is a device to copy to, and plain memory otherwise. A tensor holds its slab for as long as anything
references its storage, autograd included; then the slab returns to the pool by itself. Unused slabs are freed only if
the pool would otherwise exceed its budget.

A slab that sequences of another length have left may be larger than the tensor in it. What the slabs in use leave
unused is limited to what the budget has beyond the need of the sequences, so that one that fits the budget never fails:

    bytes of tensors <= needed,   unused bytes of their slabs <= budget - needed,   their sum <= budget
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from bisect import bisect_right, insort
from concurrent.futures import ThreadPoolExecutor
from math import inf, prod

import torch
from torch import Tensor

_TOUCH_THREADS = 16
_PAGE = mmap.PAGESIZE
_SHRINK = (
    "shorten --seq-length, raise --ds-sequence-parallel-size, lower --micro-batch-size, or leave more of the chunks on "
    "the GPU with --ds-sequence-parallel-fpdt-device-memory"
)


class HostMemoryError(MemoryError):
    """The pool would exceed its budget, or the machine cannot allocate or pin the memory."""


class _Slab:
    """An anonymous memory map; a pinned one is unpinned before its addresses are freed."""

    def __init__(self, num_bytes: int, pinned: bool, length: int) -> None:
        self.memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # kernels built without huge pages
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.memory.madvise(mmap.MADV_DONTFORK)  # a child process would get copies of pinned pages
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.num_bytes = num_bytes
        self.length = length
        if pinned:
            _touch(self.address, num_bytes)
            _register(self.address, num_bytes)
            weakref.finalize(self, _unregister, self.address).atexit = False


class HostPool:
    """Host buffers by size in bytes, each used by one tensor at a time.

    `length` is that of the sequences whose chunks are stored now. A buffer that was allocated at another length also
    holds smaller tensors. At one length each size has buffers of its own, so that no tensor takes that of a larger one.
    """

    def __init__(self, pinned: bool, budget_bytes: int | None = None) -> None:
        self.pinned = pinned
        self.budget_bytes = budget_bytes
        self.length = 0
        self.allocated_bytes = 0
        self.used_bytes = 0
        self.peak_used_bytes = 0
        self.num_slabs = 0
        self._spare_bytes = inf if budget_bytes is None else 0.0  # that slabs in use may leave unused
        self._unused_bytes = 0  # that they leave unused
        self._free: dict[int, list[_Slab]] = {}
        self._addresses: list[tuple[int, int]] = []  # (first, one past the last) of every slab, sorted

    def begin_sequence(self, length: int, needed_bytes: float) -> None:
        """Store chunks of sequences of a length from now on, at most so many bytes at once; infinite if unknown."""
        self.length = length
        if self.budget_bytes is not None:
            self._spare_bytes = self.budget_bytes - needed_bytes

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized contiguous CPU tensor on its own slab; after the first step no call allocates."""
        num_elements = prod(shape)
        if num_elements == 0:
            return torch.empty(shape, dtype=dtype)
        num_bytes = num_elements * dtype.itemsize
        free = self._free.setdefault(num_bytes, [])
        slab = free.pop() if free else self._left_by_another_length(num_bytes) or self._allocate(num_bytes)
        self.used_bytes += num_bytes
        self._unused_bytes += slab.num_bytes - num_bytes
        self.peak_used_bytes = max(self.peak_used_bytes, self.used_bytes)
        # The storage references this view of the slab: when the last tensor on the storage goes, so does the view.
        view = memoryview(slab.memory)
        weakref.finalize(view, self._release, slab, num_bytes).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=num_elements).view(shape)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a tensor of this size needs no other slab to be freed."""
        if self._free.get(num_bytes) or self.budget_bytes is None:
            return True
        return self.allocated_bytes + num_bytes <= self.budget_bytes

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor is stored in a slab of this pool."""
        if tensor.device.type != "cpu":
            return False
        address = tensor.untyped_storage().data_ptr()
        position = bisect_right(self._addresses, (address, 1 << 64)) - 1
        return position >= 0 and address < self._addresses[position][1]

    def _left_by_another_length(self, num_bytes: int) -> _Slab | None:
        """Take the smallest free slab of another length that holds so many bytes and leaves no more than is spare."""
        largest = num_bytes + self._spare_bytes - self._unused_bytes
        for size in sorted(size for size in self._free if num_bytes < size <= largest):
            slabs = self._free[size]
            for index, slab in enumerate(slabs):
                if slab.length != self.length:
                    return slabs.pop(index)
        return None

    def _release(self, slab: _Slab, num_bytes: int) -> None:
        self.used_bytes -= num_bytes
        self._unused_bytes -= slab.num_bytes - num_bytes
        self._free[slab.num_bytes].append(slab)

    def _allocate(self, num_bytes: int) -> _Slab:
        self._make_room(num_bytes)
        if self.budget_bytes is not None and self.allocated_bytes + num_bytes > self.budget_bytes:
            needed_bytes = self.allocated_bytes + num_bytes
            raise HostMemoryError(
                f"the host tier needs at least {_gib(needed_bytes)} GiB, {needed_bytes - self.budget_bytes:,} bytes "
                f"more than the {_gib(self.budget_bytes)} GiB that it may use "
                f"(--ds-sequence-parallel-fpdt-host-memory); {_SHRINK}."
            )
        try:
            slab = _Slab(num_bytes, self.pinned, self.length)
        except OSError as error:
            raise HostMemoryError(
                f"the machine refused {_gib(num_bytes)} GiB of host memory "
                f"on top of {_gib(self.allocated_bytes)} GiB ({error}); {_SHRINK}."
            ) from error
        insort(self._addresses, (slab.address, slab.address + num_bytes))
        self.allocated_bytes += num_bytes
        self.num_slabs += 1
        return slab

    def _make_room(self, num_bytes: int) -> None:
        """Free unused slabs if the budget requires it, those of sequences of another length first."""
        if self.budget_bytes is None or self.allocated_bytes + num_bytes <= self.budget_bytes:
            return
        if self.pinned:
            torch.cuda.synchronize()  # copies of tensors that used these slabs may still be in flight
        unused = [slab for slabs in self._free.values() for slab in slabs]
        for slab in sorted(unused, key=lambda slab: slab.length == self.length):
            if self.allocated_bytes + num_bytes <= self.budget_bytes:
                return
            self._free[slab.num_bytes].remove(slab)
            self._addresses.remove((slab.address, slab.address + slab.num_bytes))
            self.allocated_bytes -= slab.num_bytes
            self.num_slabs -= 1


def _touch(address: int, num_bytes: int) -> None:
    """Fault the pages in from several threads; registration would use a single thread."""
    part = -(-num_bytes // _TOUCH_THREADS // _PAGE) * _PAGE
    with ThreadPoolExecutor(_TOUCH_THREADS) as threads:
        for start in range(0, num_bytes, part):
            threads.submit(ctypes.memset, address + start, 0, min(part, num_bytes - start))


def _register(address: int, num_bytes: int) -> None:
    error = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
    if int(error) != 0:
        raise HostMemoryError(
            f"CUDA refused to pin {_gib(num_bytes)} GiB of host memory (cudaHostRegister: error {int(error)}); "
            "raise the limit of locked memory (ulimit -l unlimited, or the container's memlock limit)."
        )


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
