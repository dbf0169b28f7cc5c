"""Every CUDA backend against fp64, tile by tile, with the output and log-sum-exp of the whole row."""

from dataclasses import replace

import pytest
import torch

from megatron.core.documents import CAUSAL_TILE, FULL_TILE, Documents, Mask, Region, tile_regions
from megatron.ops.attention import (
    BACKENDS,
    QKV,
    AttentionOutput,
    AttentionUnavailable,
    AttentionVariant,
    KernelVariant,
    backward_regions,
    forward_regions,
)
from megatron.ops.attention.reference import ReferenceAttention
from megatron.ops.attention.select import NOT_FOR_SHORT_TILES
from tests.unit.ops.attention.test_cpu_backends import (
    draw,
    draw_row,
    errors,
    request_for,
    row_mask,
    row_of_two_tiles,
    tiled,
    truth,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA_BACKENDS = [backend for backend in BACKENDS if backend.name not in ("torch-cpu", "reference")]
RESULTS = ("o", "lse", "dq", "dk", "dv")
#        batch, chunk lengths, query heads, key/value heads, head size
SHAPES = {
    "mha, head size 64": (1, [256, 256, 200], 4, 4, 64),
    "gqa, head size 80, batch of 3": (3, [256, 200], 4, 2, 80),
    "mha, head size 96": (1, [256, 200], 4, 4, 96),
    "gqa, head size 128": (1, [256, 256, 40], 8, 2, 128),
    "mqa, head size 128, batch of 3": (3, [256, 256, 40], 4, 1, 128),
}
# flash-attn-4 compiles every combination of head size, number format and heads per group, which takes seconds each.
NOT_WITH_FLASH_ATTN_4 = {
    (torch.float16, "mha, head size 64"),
    (torch.bfloat16, "gqa, head size 80, batch of 3"),
    (torch.float16, "mha, head size 96"),
    (torch.float16, "gqa, head size 128"),
    (torch.float16, "mqa, head size 128, batch of 3"),
}
CASES = [
    pytest.param(backend, dtype, shape, id=f"{backend.name}-{dtype}-{name}".replace("torch.", ""))
    for backend in CUDA_BACKENDS
    for dtype in (torch.bfloat16, torch.float16)
    for name, shape in SHAPES.items()
    if backend.name != "flash-attn-4" or (dtype, name) not in NOT_WITH_FLASH_ATTN_4
]


def skip_unless_served(backend, dtype, head_size, deterministic=False, **variant):
    device = torch.device("cuda", torch.cuda.current_device())
    if refusal := backend.refusal(request_for(device, dtype, head_size, deterministic, **variant)):
        pytest.skip(refusal)


def skip_where_short_tiles_crash(backend):
    if backend.name in NOT_FOR_SHORT_TILES:
        pytest.skip(NOT_FOR_SHORT_TILES[backend.name])


def assert_errs_like(got, same_precision, exact, floor=1e-5):
    """Assert that no error is above three times that of the reference in the same number format."""
    for name, error, allowed in zip(RESULTS, errors(got, exact), errors(same_precision, exact), strict=True):
        assert error <= 3 * allowed + floor, name


def side_by_side(k, v):
    """k and v as the block has them: views of one tensor, along the heads."""
    return torch.cat([k, v], 2).chunk(2, 2)


@pytest.mark.parametrize("layout", ["contiguous", "views"])
@pytest.mark.parametrize("backend, dtype, shape", CASES)
def test_tiles_err_no_more_than_the_same_precision_reference(backend, dtype, shape, layout):
    lengths, scale = shape[1], shape[-1] ** -0.5
    skip_unless_served(backend, dtype, shape[-1])
    tensors = [t.cuda() for t in draw(shape, dtype)]
    exact = truth(*tensors, scale)
    q, k, v, do = (t.to(dtype) for t in tensors)
    same_precision = tiled(ReferenceAttention(), q, k, v, do, scale, lengths)
    if layout == "views":
        (q, do), (k, v) = side_by_side(q, do), side_by_side(k, v)
        assert not any(t.is_contiguous() for t in (q, k, v, do))
    assert_errs_like(tiled(backend, q, k, v, do, scale, lengths), same_precision, exact)


# The second chunk's tiles are 1 x C and 1 x 1, or C x 1 and C x C.
ONE_TOKEN = {"1 x 5": [5, 1], "5 x 1": [1, 5], "1 x 256": [256, 1], "256 x 1": [1, 256], "1 x 1": [1, 1]}


@pytest.mark.parametrize("lengths", ONE_TOKEN.values(), ids=ONE_TOKEN.keys())
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_tiles_of_one_token_err_no_more_than_the_same_precision_reference(backend, batch, lengths):
    skip_unless_served(backend, torch.bfloat16, 128)
    tensors = [t.cuda() for t in draw((batch, lengths, 8, 2, 128), torch.bfloat16)]
    exact = truth(*tensors, 0.1)
    q, k, v, do = (t.bfloat16() for t in tensors)
    k, v = side_by_side(k, v)
    same_precision = tiled(ReferenceAttention(), q, k, v, do, 0.1, lengths)
    assert_errs_like(tiled(backend, q, k, v, do, 0.1, lengths), same_precision, exact)


#   the mask of one of a row's two tiles; softcap; head size
LIMITS = {
    "upper, head size 128": (Region(mask=Mask.UPPER), None, 128),
    "window of 1, head size 128": (Region(mask=Mask.CAUSAL, window=1), None, 128),
    "window of 128, head size 64": (Region(mask=Mask.CAUSAL, window=128), None, 64),
    "window of 100, head size 192": (Region(mask=Mask.CAUSAL, window=100), None, 192),
    "softcap, head size 128": (Region(mask=Mask.CAUSAL), 2.0, 128),
    "softcap, rectangle, head size 128": (Region(mask=Mask.FULL), 2.0, 128),
    "softcap, window of 100, head size 256": (Region(mask=Mask.CAUSAL, window=100), 2.0, 256),
}
TANH_ERROR = 2**-10  # of the GPU's approximation, relative


@pytest.mark.parametrize("region, softcap, head_size", LIMITS.values(), ids=LIMITS.keys())
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_limits_of_a_tile_err_no_more_than_the_same_precision_reference(backend, region, softcap, head_size):
    skip_unless_served(backend, torch.bfloat16, head_size, softcap=softcap)
    if region.window is not None:
        skip_where_short_tiles_crash(backend)
    shape, variant = (2, 300, 90, 8, 2, head_size), AttentionVariant(head_size**-0.5, softcap)
    tensors = [t.cuda() for t in draw_row(shape, torch.bfloat16)]
    exact = truth(*tensors, variant.scale, softcap, row_mask(region, shape))
    q, k, v, do = (t.bfloat16() for t in tensors)
    k, v = side_by_side(k, v)
    got, same_precision = (
        row_of_two_tiles(by, q, k, v, do, variant, region) for by in (backend, ReferenceAttention())
    )  # fmt: skip
    assert_errs_like(got, same_precision, exact, 1e-5 if softcap is None else TANH_ERROR)


DOCUMENTS = {
    "many": ((0, 130), (130, 131), (131, 200), (200, 257), (257, 512)),
    "gaps": ((0, 17), (17, 18), (18, 19), (19, 65), (100, 228), (300, 500)),
    "two": ((0, 300), (300, 512)),
}


@pytest.mark.parametrize("rows", [[(0, 512)], [(0, 120), (392, 512)], [(120, 392)]], ids=str)
@pytest.mark.parametrize("names", [(), ("many",), ("gaps",), ("two",), ("many", "two", "gaps")], ids=" and ".join)
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_regions_of_a_tile_err_no_more_than_the_same_precision_reference(backend, names, rows):
    check_regions(backend, names, rows)


@pytest.mark.parametrize("window", [1, 50])
@pytest.mark.parametrize("names", [("many",), ("many", "gaps")], ids=" and ".join)
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_windows_of_documents_err_no_more_than_the_same_precision_reference(backend, names, window):
    check_regions(backend, names, [(0, 512)], window)


def check_regions(backend, names, rows, window=None):
    skip_unless_served(backend, torch.bfloat16, 128)
    if names:
        skip_where_short_tiles_crash(backend)
    documents = Documents(tuple(DOCUMENTS[name] for name in names)) if names else None
    regions, own = tile_regions(documents, rows, (0, 512)), torch.cat([torch.arange(*span) for span in rows])
    if window is not None:
        regions = tuple(replace(region, window=window) for region in regions)
    tensors = [t.cuda() for t in draw((max(len(names), 1), [512], 8, 2, 128), torch.bfloat16)]

    def results(by, dtype):
        q, k, v, do = (t.to(dtype) for t in tensors)
        k, v = side_by_side(k, v)
        qkv, variant = QKV(q[own], k, v), AttentionVariant(0.1)
        o, lse = forward_regions(by, qkv, variant, regions)
        output = AttentionOutput(o.to(dtype), lse)
        sees_keys = lse > torch.finfo(lse.dtype).min
        return o, lse.where(sees_keys, 0), *backward_regions(by, do[own], qkv, output, variant, regions)

    exact, same_precision = (results(ReferenceAttention(), dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_errs_like(results(backend, torch.bfloat16), same_precision, exact)


REPEATS = 5
TILES = {
    "causal": CAUSAL_TILE,
    "full": FULL_TILE,
    "upper": (Region(mask=Mask.UPPER),),
    "window": (Region(mask=Mask.CAUSAL, window=1000),),
    "documents": tile_regions(
        Documents.from_starts([(0, 1000, 1001, 3000, 3500, 7000)], 8192), [(0, 8192)], (0, 8192)
    ),
}  # fmt: skip
#       query heads, key/value heads, head size; batch; tokens; tiles
REPEATED = {
    "mha, head size 64": ((8, 8, 64), 1, 8192, ["causal", "full"]),
    "gqa, head size 128": ((16, 4, 128), 1, 8192, ["documents"]),
    "gqa, head size 128, uneven": ((16, 4, 128), 1, 8000, ["causal", "full", "upper", "window"]),
    "gqa, head size 128, batch of 3": ((8, 2, 128), 3, 2048, ["causal", "full"]),
}
REPEATED_TILES = [
    pytest.param(*shape, TILES[tile], id=f"{name}, {tile}")
    for name, (*shape, tiles) in REPEATED.items()
    for tile in tiles
]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("heads, batch, length, regions", REPEATED_TILES)
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_the_same_inputs_give_the_same_bits_in_deterministic_mode(backend, heads, batch, length, regions):
    H, K, D = heads
    skip_unless_served(backend, torch.bfloat16, D, deterministic=True)
    q, k, v, do = (t.bfloat16().cuda() for t in draw((batch, [length], H, K, D)))
    qkv, variant = QKV(q, *side_by_side(k, v)), AttentionVariant(D**-0.5)

    def results():
        o, lse = forward_regions(backend, qkv, variant, regions)
        output = AttentionOutput(o.to(q.dtype), lse)
        return *output, *backward_regions(backend, do, qkv, output, variant, regions)

    first = results()
    for _ in range(REPEATS):
        again = zip(RESULTS, results(), first, strict=True)
        assert [name for name, other, one in again if not torch.equal(other, one)] == []


@pytest.mark.parametrize("mask", Mask)
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_results_have_the_shapes_and_dtypes_of_the_protocol_and_inputs_are_not_written_to(backend, mask):
    skip_unless_served(backend, torch.bfloat16, 128)
    q, k, v, do = (t.bfloat16().cuda() for t in draw((3, [256], 8, 2, 128)))
    qkv, variant = QKV(q, k, v), KernelVariant(0.1, mask)
    o, lse = output = backend.forward(qkv, variant)
    assert (o.shape, o.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((3, 8, 256), torch.float32)
    tensors = [do, *qkv, *output]
    originals = [t.clone() for t in tensors]
    gradients = backend.backward(do, qkv, output, variant)
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in (q, k, v)]
    assert all(torch.equal(t, original) for t, original in zip(tensors, originals, strict=True))


@pytest.fixture
def sixty_gibibytes():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


#   tokens, batch, key/value heads, each with 4 query heads of 128
LARGE = {"many sequences": (1024, 2064, 2), "many heads": (4096, 1, 1026)}


@pytest.mark.usefixtures("sixty_gibibytes")
@pytest.mark.parametrize("size", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda b: b.name)
def test_more_than_two_to_the_31_elements(backend, size):
    S, B, K = size
    scale = 128**-0.5
    skip_unless_served(backend, torch.bfloat16, 128)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw_on_device(heads):
        return torch.randn(S, B, heads, 128, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, do = draw_on_device(4 * K), draw_on_device(4 * K)
    k, v = side_by_side(draw_on_device(K), draw_on_device(K))
    assert q.numel() > 2**31
    qkv, variant = QKV(q, k, v), KernelVariant(scale, Mask.CAUSAL)
    try:
        o, lse = output = backend.forward(qkv, variant)
    except AttentionUnavailable as refusal:
        pytest.skip(str(refusal))
    gradients = backend.backward(do, qkv, output, variant)

    for sequence, group in ((0, 0), (B // 2, K // 2), (B - 1, K - 1)):

        def part(t, heads_dim, b=sequence, g=group):
            """What one sequence's key/value head and its query heads have of `t`."""
            width = t.shape[heads_dim] // K
            return t.narrow(1 if heads_dim == 2 else 0, b, 1).narrow(heads_dim, g * width, width)

        inputs = [part(t, 2) for t in (q, k, v, do)]
        got = [part(o, 2), part(lse, 1), *(part(t, 2) for t in gradients)]
        exact = tiled(ReferenceAttention(), *(t.double() for t in inputs), scale, [S])
        same_precision = tiled(ReferenceAttention(), *inputs, scale, [S])
        assert_errs_like(got, same_precision, exact)
