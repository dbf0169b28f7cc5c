"""Pinned host memory in pieces of one size, through which chunks go to the disk and come from it.

All of it is allocated at the start. The pieces are handed out one by one and come back from any thread.
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.fpdt.disk_files import STRIPE_BYTES
from megatron.fpdt.host_pool import HostPool

# With less, the disk would be idle between a copy and the next.
LEAST_STAGING_BYTES = 8 * STRIPE_BYTES
SHARE_AHEAD = 0.75  # that reads ahead may take; the rest is for writes, and for reads that are not ahead


def staging_for(bytes_ahead: int) -> int:
    """Return the staging memory that lets so many bytes be read ahead."""
    return -(-int(bytes_ahead / SHARE_AHEAD) // STRIPE_BYTES) * STRIPE_BYTES


class Piece(NamedTuple):
    """A piece of pinned memory, and the copy to the device that may still read it."""

    memory: Tensor
    read: torch.cuda.Event | None = None

    def view(self, num_bytes: int) -> memoryview:
        """Return its first bytes, for reads and writes of files."""
        return self.memory.numpy().data[:num_bytes]


class Staging:
    """Pieces of memory, each in the hands of one transfer at a time."""

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        self.num_pieces = max(num_bytes, LEAST_STAGING_BYTES) // STRIPE_BYTES
        pool = HostPool(pinned)
        self._free: SimpleQueue[Piece] = SimpleQueue()
        for memory in pool.empty((self.num_pieces, STRIPE_BYTES), torch.uint8):
            self._free.put(Piece(memory))

    @property
    def num_bytes(self) -> int:
        return self.num_pieces * STRIPE_BYTES

    @property
    def num_free(self) -> int:
        """Pieces that nobody holds now."""
        return self._free.qsize()

    def acquire(self) -> Piece:
        """Take a piece; wait for one if none is free."""
        return self._free.get()

    def release(self, piece: Piece) -> None:
        self._free.put(piece)
