"""Attention of one tile (one query chunk against one key/value chunk): one protocol, several backends."""

from megatron.ops.attention.protocol import (
    QKV,
    AttentionBackend,
    AttentionOutput,
    AttentionRequest,
    AttentionUnavailable,
    AttentionVariant,
    KernelVariant,
)
from megatron.ops.attention.regions import backward_regions, forward_regions, region_of
from megatron.ops.attention.select import BACKENDS, choose_backend, choose_backend_for_few_queries

__all__ = [
    "BACKENDS",
    "QKV",
    "AttentionBackend",
    "AttentionOutput",
    "AttentionRequest",
    "AttentionUnavailable",
    "AttentionVariant",
    "KernelVariant",
    "backward_regions",
    "choose_backend",
    "choose_backend_for_few_queries",
    "forward_regions",
    "region_of",
]
