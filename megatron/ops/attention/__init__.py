"""Attention of one tile (one query chunk against one key/value chunk), behind one protocol with several backends."""

from megatron.ops.attention.protocol import AttentionBackend, AttentionUnavailable
from megatron.ops.attention.regions import backward_regions, forward_regions
from megatron.ops.attention.select import BACKENDS, choose_backend

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionUnavailable",
    "backward_regions",
    "choose_backend",
    "forward_regions",
]
