"""Every CUDA backend against fp64, tile by tile, with the output and log-sum-exp of the whole row."""

import pytest
import torch

from megatron.ops.attention import BACKENDS
from megatron.ops.attention.reference import ReferenceAttention
from megatron.ops.merge import merge_

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA_BACKENDS = [b for b in BACKENDS if b.name in ("cudnn", "torch-flash")]
SHAPES = {
    "mha": (1, 512, 4, 4, 64),
    "gqa": (1, 512, 8, 2, 128),
    "mqa, batch of 3": (3, 256, 4, 1, 128),
    "head size 80, uneven tile": (2, 200, 4, 2, 80),
    "head size 96": (1, 384, 4, 4, 96),
}


def _row(backend, tensors, dtype):
    """One query chunk against two key/value chunks, then the gradients: (o, lse, dq, [dk..], [dv..])."""
    q, ks, vs, do, scale = tensors
    cast = lambda t: t.to(dtype)  # noqa: E731
    tiles = [(cast(ks[1]), cast(vs[1]), True), (cast(ks[0]), cast(vs[0]), False)]
    o = lse = None
    for k, v, causal in tiles:
        o_tile, lse_tile = backend.forward(cast(q), k, v, causal=causal, scale=scale)
        if o is None:
            o, lse = o_tile.to(torch.promote_types(dtype, torch.float32)), lse_tile
        else:
            merge_(o, lse, o_tile, lse_tile)
    o = o.to(dtype)
    grads = [backend.backward(cast(do), cast(q), k, v, o, lse, causal=causal, scale=scale) for k, v, causal in tiles]
    dq = sum(g[0].double() for g in grads)
    return [o, lse, dq, *(t for g in grads for t in g[1:])]


def _error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_row_of_tiles_errs_no_more_than_the_same_precision_reference(backend, shape):
    B, S, H, K, D = shape
    refusal = backend.refusal(torch.device("cuda"), torch.bfloat16, D)
    if refusal:
        pytest.skip(refusal)
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda heads: torch.randn(S, B, heads, D, generator=generator, device="cuda", dtype=torch.float64)  # noqa: E731
    q, do = draw(H).bfloat16().double(), draw(H).bfloat16().double()
    ks, vs = ([draw(K).bfloat16().double() for _ in range(2)] for _ in range(2))
    tensors = (q, ks, vs, do, D**-0.5)
    truth = _row(ReferenceAttention(), tensors, torch.float64)
    same_precision = _row(ReferenceAttention(), tensors, torch.bfloat16)
    results = _row(backend, tensors, torch.bfloat16)
    for name, result, exact, rounded in zip(
        ["o", "lse", "dq", "dk diagonal", "dv diagonal", "dk", "dv"], results, truth, same_precision, strict=True
    ):
        assert _error(result, exact) <= 3 * _error(rounded, exact) + 1e-5, name
