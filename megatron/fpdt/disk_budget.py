"""Host memory and disk shared out to the chunks that leave the device.

Some kinds are copied many times per block: gradients of keys and values, keys and values, gradients of hidden states.
Host memory is reserved for them. The rest of the host is filled with the other kinds, which are written once and read
once or twice. All blocks put the same share of these on disk, so that the disk is equally busy at all times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.disk_files import STRIPE_BYTES
from megatron.fpdt.staging import LEAST_STAGING_BYTES, staging_for

# Copied more often than once out and once in per step.
BUSY_KINDS = (ChunkKind.KEY_VALUE_GRADIENTS, ChunkKind.KEYS_VALUES, ChunkKind.HIDDEN_GRADIENTS)


@dataclass(frozen=True)
class DiskBudget:
    """Where a rank stores chunks on disk, and how the host is shared with it."""

    folders: tuple[str, ...]
    file_bytes: int
    """Reserved on disk, over all folders."""

    staging_bytes: int
    """Pinned host memory through which chunks are written and read ahead, besides the budget of the host's chunks."""

    disk_share: float = 1.0
    """Share of the bytes of the other kinds that goes to the disk."""

    reserved_bytes: Mapping[ChunkKind, int] = field(default_factory=lambda: MappingProxyType({}))
    """Host memory for `BUSY_KINDS`."""


@dataclass(frozen=True)
class HostAndDisk:
    """Bytes of chunks that host and disk share, per rank."""

    host_bytes: int
    """At most, without the staging memory."""

    disk_bytes: int
    staging_bytes: int
    file_bytes: int
    """To reserve on disk: tensors are placed whole, so that there may be more on it for a while."""

    disk_share: float
    reserved_bytes: Mapping[ChunkKind, int]

    def budget(self, folders: tuple[str, ...]) -> DiskBudget:
        return DiskBudget(folders, self.file_bytes, self.staging_bytes, self.disk_share, self.reserved_bytes)


def least_host_bytes(needed: Mapping[ChunkKind, int]) -> int:
    """Return the host memory for what is copied most, and for the least staging memory."""
    return sum(needed[kind] for kind in BUSY_KINDS) + LEAST_STAGING_BYTES


def divide(
    needed: Mapping[ChunkKind, int], host_bytes: int, bytes_ahead: int, largest_tensor: int
) -> HostAndDisk | None:
    """Divide chunks between a host with so much memory and a disk: the disk takes what the host has no room for.

    The staging memory lets `bytes_ahead` be read ahead, or less on a small host. None if the host cannot even hold
    what is copied most.
    """
    if host_bytes < least_host_bytes(needed):
        return None
    busy = {kind: needed[kind] for kind in BUSY_KINDS}
    others, free = sum(needed.values()) - sum(busy.values()), host_bytes - sum(busy.values())
    staging = max(min(staging_for(bytes_ahead), free // 2 // STRIPE_BYTES * STRIPE_BYTES), LEAST_STAGING_BYTES)
    on_disk = max(others - (free - staging), 0)
    file_bytes = on_disk + on_disk // 50 + 2 * largest_tensor + STRIPE_BYTES
    return HostAndDisk(host_bytes - staging, on_disk, staging, file_bytes, on_disk / max(others, 1), busy)


class HostShare:
    """Bytes of chunks on the host and on the disk behind it."""

    def __init__(self, host_bytes: int, budget: DiskBudget) -> None:
        self._host_bytes, self._budget = host_bytes, budget
        self._on_host = dict.fromkeys(ChunkKind, 0)
        self._others_on_disk = 0

    def host_has_room(self, num_bytes: int, kind: ChunkKind) -> bool:
        """Whether a tensor goes to the host: a busy kind if it fits, another if the host holds less than its share."""
        free = self._host_bytes - sum(self._on_host.values())
        if kind in BUSY_KINDS:
            return num_bytes <= free
        reserved = self._budget.reserved_bytes
        free -= sum(max(reserved.get(busy, 0) - self._on_host[busy], 0) for busy in BUSY_KINDS)
        others = sum(num for each, num in self._on_host.items() if each not in BUSY_KINDS)
        share = (1 - self._budget.disk_share) * (others + self._others_on_disk + num_bytes)
        return num_bytes <= free and others < share

    def add_on_host(self, num_bytes: int, kind: ChunkKind) -> None:
        self._on_host[kind] += num_bytes

    def add_on_disk(self, num_bytes: int, kind: ChunkKind) -> None:
        if kind not in BUSY_KINDS:
            self._others_on_disk += num_bytes
