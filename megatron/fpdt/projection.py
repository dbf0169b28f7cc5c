"""Queries, keys and values of a streamed block, and its keys and values once more for a backward pass without them.

Keys and values take up as much of the tier as attention outputs, or more where heads are repeated for the ranks. Made
anew from the block's inputs they cost its first product and an all-to-all, little beside attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.collectives import QUERIES_KEYS_VALUES, Exchange, repeat_key_value_heads
from megatron.core.ranges import TOKEN_WISE, named_range
from megatron.fpdt.store import Prefetch
from megatron.fpdt.stream import CausalBlock, Stream


def project(stream: Stream, block: CausalBlock, x_cBh: Tensor, positions_Bc: Tensor) -> tuple[Tensor, Tensor]:
    """`before` of this rank's tokens of a chunk, key/value heads repeated where there are fewer than ranks."""
    with named_range(TOKEN_WISE):
        q, kv = block.before(x_cBh, positions_Bc)
        return q, repeat_key_value_heads(kv, stream.parallel_state.sequence_parallel_size)


def make_keys_and_values(
    stream: Stream,
    block: CausalBlock,
    chunks: Sequence[int],
    xs_cBh: Sequence[Tensor],
    positions_Bc: Sequence[Tensor],
    kv_CBKD: Sequence[Tensor],
) -> None:
    """Put keys and values of these chunks on the tier, from the block's inputs. Collective as the block is."""
    inputs_ahead = stream.store.prefetch([xs_cBh[i], positions_Bc[i]] for i in chunks)
    started = stream.started_ahead(_start_keys_and_values(stream, block, inputs_ahead) for _ in chunks)
    for i in chunks:
        (kv,) = next(started)()
        stream.store.put(kv_CBKD[i], kv)


@torch.no_grad()
def _start_keys_and_values(stream: Stream, block: CausalBlock, inputs_ahead: Prefetch) -> Exchange:
    _, kv = project(stream, block, *next(inputs_ahead))
    return stream.start_tokens_to_heads([kv], QUERIES_KEYS_VALUES[1:])
