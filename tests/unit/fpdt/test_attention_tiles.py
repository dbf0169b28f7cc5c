"""A single query over chunks of keys, as generation has it, against the softmax of all at once."""

import pytest
import torch
from torch import Tensor

from megatron.core.documents import CAUSAL_TILE, FULL_TILE
from megatron.fpdt.attention_tiles import TileRow, attend_one_token
from megatron.fpdt.plan import Tile
from megatron.fpdt.store import ChunkStore
from megatron.ops.attention import AttentionBackend, AttentionVariant
from megatron.ops.attention.reference import ReferenceAttention
from megatron.ops.attention.torch_backends import TorchCpuAttention

BACKENDS = [TorchCpuAttention(), ReferenceAttention()]


def draw(
    lengths: list[int], num_heads: int, num_kv_heads: int, magnitude: float, head_size: int = 16
) -> tuple[Tensor, list[Tensor]]:
    """q [1, 1, H, D] with scores of that magnitude, and [C, 1, 2K, D] of each length, in fp64."""
    generator = torch.Generator().manual_seed(sum(lengths))
    q, *parts = (
        torch.randn(length, 1, heads, head_size, generator=generator, dtype=torch.float64)
        for length, heads in ((1, num_heads), *((length, 2 * num_kv_heads) for length in lengths))
    )
    return q * magnitude, parts


def scale_of(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def attended(
    backend: AttentionBackend, q: Tensor, parts: list[Tensor], offloading: bool, sinks: Tensor | None = None
) -> Tensor:
    """The last part is the query's own."""
    *cached, own = parts
    store = ChunkStore(q.device, offloading)
    chunks = [store.empty(part.shape, part.dtype) for part in cached]
    for chunk, part in zip(chunks, cached, strict=True):
        store.put(chunk, part)
    n = len(cached)
    tiles = [Tile(n, n, CAUSAL_TILE), *(Tile(n, key, FULL_TILE) for key in range(n))]
    row = TileRow(backend, AttentionVariant(scale_of(q)), tiles)
    return attend_one_token(row, q, own, store.prefetch([[c] for c in chunks], ahead=False), sinks)


def softmax_of_all(q: Tensor, parts: list[Tensor], sinks: Tensor | None = None) -> Tensor:
    k, v = (
        t.squeeze(1).repeat_interleave(2 * q.shape[2] // parts[0].shape[2], 1) for t in torch.cat(parts).chunk(2, 2)
    )
    scores = torch.einsum("hd,chd->hc", q[0, 0], k) * scale_of(q)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None]], 1)
    return torch.einsum("hc,chd->hd", scores.softmax(-1)[:, : len(k)], v)[None, None]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("offloading", [False, True], ids=["device", "offloading"])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(8, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [300, 1], [64, 64, 37, 5, 1]])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_a_query_over_parts_sees_what_it_sees_over_all_keys_at_once(
    backend: AttentionBackend,
    offloading: bool,
    num_heads: int,
    num_kv_heads: int,
    lengths: list[int],
    with_sinks: bool,
) -> None:
    q, parts = draw(lengths, num_heads, num_kv_heads, 1.0)
    sinks = torch.linspace(-1, 2, num_heads, dtype=torch.float64) if with_sinks else None
    o = attended(backend, q, parts, offloading, sinks)
    assert o.shape == q.shape
    torch.testing.assert_close(o, softmax_of_all(q, parts, sinks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_scores_of_ten_thousand_do_not_overflow(backend: AttentionBackend) -> None:
    q, parts = draw([64, 37, 1], 8, 2, 1e4)
    scores = torch.einsum("hd,chd->ch", q[0, 0, :4], parts[0][:, 0, :1].expand(-1, 4, -1)) * scale_of(q)
    assert scores.max() > 1e4
    assert scores.min() < -1e4
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        o = attended(backend, q.to(dtype), [part.to(dtype) for part in parts], offloading=True)
        assert o.dtype == dtype
        exact = softmax_of_all(q.to(dtype).double(), [part.to(dtype).double() for part in parts])
        torch.testing.assert_close(o.double(), exact, rtol=0, atol=tolerance)


def test_results_in_half_precision_are_merged_in_fp32() -> None:
    q, parts = draw([50] * 20 + [1], 8, 2, 1.0)
    q, parts = q.bfloat16(), [part.bfloat16() for part in parts]
    o = attended(ReferenceAttention(), q, parts, offloading=False)
    exact = softmax_of_all(q.double(), [part.double() for part in parts])
    assert o.dtype == torch.bfloat16
    assert (o - exact).abs().max() <= 2**-8 * exact.abs().max()
