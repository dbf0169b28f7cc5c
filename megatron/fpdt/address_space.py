"""Addresses without memory: tensors that name places on disk.

A chunk on disk is a tensor as any other, which may be split and recognized by its address. Its address, from the first
of the space on, is its place in the files. The addresses are reserved and may not be accessed: a read or write that
does not go through the tier ends the process, rather than give a wrong result.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 4096  # of tensors, as direct reads and writes require of places in a file
_NO_ACCESS = 0


class AddressSpace:
    """A range of reserved addresses, allocated first-fit: tensors released in reverse order leave no holes."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes // ALIGNMENT * ALIGNMENT
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(self.num_bytes, ALIGNMENT), flags=flags, prot=_NO_ACCESS)
        self._first: int = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._free: list[tuple[int, int]] = [(0, self.num_bytes)] if self.num_bytes else []  # (first, end), sorted
        self.used_bytes = 0
        self.peak_used_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether a tensor of this size has a place."""
        needed = _aligned(num_bytes)
        return any(end - first >= needed for first, end in self._free)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous CPU tensor without memory. Its place is free when nothing references its storage."""
        num_elements = prod(shape)
        if num_elements == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        num_bytes = num_elements * dtype.itemsize
        place = self._take(_aligned(num_bytes))
        view = memoryview((ctypes.c_byte * num_bytes).from_address(self._first + place))
        weakref.finalize(view, self._release, place, _aligned(num_bytes)).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=num_elements).view(tuple(shape))

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of this space, or a part of one."""
        return tensor.device.type == "cpu" and 0 <= tensor.data_ptr() - self._first < self.num_bytes

    def place_of(self, tensor: Tensor) -> int:
        """Return the first byte of a tensor, counted from the start of the space."""
        return tensor.data_ptr() - self._first

    def _take(self, num_bytes: int) -> int:
        for index, (first, end) in enumerate(self._free):
            if end - first >= num_bytes:
                self._free[index : index + 1] = [(first + num_bytes, end)] * (end - first > num_bytes)
                self.used_bytes += num_bytes
                self.peak_used_bytes = max(self.peak_used_bytes, self.used_bytes)
                return first
        raise MemoryError(f"{num_bytes} bytes do not fit {self.num_bytes}, of which {self.used_bytes} are in use")

    def _release(self, first: int, num_bytes: int) -> None:
        end = first + num_bytes
        index = bisect_left(self._free, (first, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == first:
            index -= 1
            first = self._free.pop(index)[0]
        self._free.insert(index, (first, end))
        self.used_bytes -= num_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
