"""Rates of the link between a GPU and the memory of its host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinkRates:
    """GB/s per GPU while all GPUs of a machine copy: each direction alone, and the sum of both at once."""

    to_gpu: float
    to_host: float
    both_ways: float

    def seconds(self, bytes_to_gpu: float, bytes_to_host: float) -> float:
        """Return the time of copies in both directions that run at once."""
        both = (bytes_to_gpu + bytes_to_host) / self.both_ways
        return max(bytes_to_gpu / self.to_gpu, bytes_to_host / self.to_host, both) / 1e9

    def __str__(self) -> str:
        return f"{self.to_gpu:.1f} GB/s in, {self.to_host:.1f} out, {self.both_ways:.1f} both ways together"
