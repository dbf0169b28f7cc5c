"""Rates of the disk that stores a rank's chunks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiskRates:
    """GB/s per GPU while all GPUs of a machine read, and while all of them write."""

    read: float
    write: float

    def seconds(self, bytes_read: float, bytes_written: float) -> float:
        """Return the time of reads and writes, which share the disk."""
        return (bytes_read / self.read + bytes_written / self.write) / 1e9

    def __str__(self) -> str:
        return f"{self.read:.2f} GB/s read, {self.write:.2f} written"
