"""Device memory for chunks, shared out by what they hold.

Chunks on the device are not copied. Gradients of keys and values would be copied both ways for every backward tile,
keys and values copied in for every tile, and all else out once and in once. So memory is reserved for the former, and
the others take what is left, first come, first served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType


class ChunkKind(IntEnum):
    """What a tensor of the tier holds; the lower, the more is gained if it stays on the GPU."""

    KEY_VALUE_GRADIENTS = 0
    """Of the block in its backward pass."""

    KEYS_VALUES = 1
    ATTENTION_OUTPUTS = 2
    PRODUCTS = 3
    """Outputs of linear layers, saved for backward."""

    HIDDEN_GRADIENTS = 4
    """Gradients of hidden states, which are where the hidden states are."""

    HIDDEN_STATES = 5
    FIRST_PRODUCTS = 6
    """Products after attention of each chunk's first slice: on the device or not saved."""


@dataclass(frozen=True)
class DeviceBudget:
    """Bytes of device memory for chunks, and how many of them are reserved for which kinds.

    `first_slices` is the share of all FIRST_PRODUCTS that the rest has room for.
    """

    total_bytes: int = 0
    reserved_bytes: Mapping[ChunkKind, int] = field(default_factory=lambda: MappingProxyType({}))
    first_slices: float = 0.0


NO_DEVICE_MEMORY = DeviceBudget()
EVERYTHING_ON_DEVICE = DeviceBudget(first_slices=1.0)  # without offloading; its bytes are not counted


class DeviceUse:
    """Bytes of chunks on the device, by kind, within a budget."""

    def __init__(self, budget: DeviceBudget) -> None:
        self.budget = budget
        self._bytes = dict.fromkeys(ChunkKind, 0)

    @property
    def total_bytes(self) -> int:
        return sum(self._bytes.values())

    def room_bytes(self, kind: ChunkKind) -> int:
        """Return the room of the budget, without what is reserved for kinds that gain more and is not in use yet."""
        reserved = self.budget.reserved_bytes
        kept = sum(max(reserved.get(other, 0) - self._bytes[other], 0) for other in ChunkKind if other < kind)
        return self.budget.total_bytes - self.total_bytes - kept

    def has_room(self, num_bytes: int, kind: ChunkKind) -> bool:
        """Whether the budget has room for a tensor of a kind."""
        return num_bytes <= self.budget.total_bytes and num_bytes <= self.room_bytes(kind)

    def add(self, num_bytes: int, kind: ChunkKind) -> None:
        self._bytes[kind] += num_bytes
