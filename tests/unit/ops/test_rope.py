import pytest
import torch

from megatron.ops.rope import RotaryEmbedding, rotate, split_and_rotate


def positions(*values):
    return torch.tensor([values])


def rotate_half(x, cos, sin):
    """The widespread formula: x cos + rotate_half(x) sin, with cos and sin repeated for both halves."""
    first, second = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)


@pytest.mark.parametrize("size", [2, 8, 64, 128])
def test_rotation_is_the_rotate_half_formula_with_fp32_angles_at_small_positions(size):
    rope, places = RotaryEmbedding(size, 10000.0), torch.arange(50).expand(2, 50)
    x = torch.randn(50, 2, 3, size)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
    angles = (places.T.float()[..., None] * frequencies)[:, :, None]
    want = rotate_half(x, angles.cos(), angles.sin())
    torch.testing.assert_close(rotate(x, *rope.cos_sin(places, x.dtype)), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("position", [0, 1, 65_535, 2_097_151, 16_777_217])
def test_angles_are_exact_at_millions_of_tokens(position, theta):
    mpmath = pytest.importorskip("mpmath")
    size = 16
    rope = RotaryEmbedding(size, theta)
    cos, sin = rope.cos_sin(positions(position), torch.float64)
    single = rope.cos_sin(positions(position), torch.bfloat16)
    with mpmath.workdps(50):
        for pair in range(size // 2):
            angle = position * mpmath.mpf(theta) ** (mpmath.mpf(-2 * pair) / size)
            for got, rounded, want in zip((cos, sin), single, (mpmath.cos(angle), mpmath.sin(angle)), strict=True):
                assert abs(got[0, 0, 0, pair].item() - float(want)) < 4e-16 * max(position, 2)
                assert abs(rounded[0, 0, 0, pair].item() - float(want)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_partial_rotation_leaves_the_rest_untouched_to_the_bit(dtype):
    rope = RotaryEmbedding(6, 10000.0)
    x = torch.randn(4, 1, 2, 24).to(dtype)
    rotated = rotate(x, *rope.cos_sin(positions(5, 6, 7, 8), dtype))
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    assert not torch.equal(rotated[..., :6], x[..., :6])


@pytest.mark.parametrize(
    "dtype, angles",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
     (torch.float64, torch.float64)],
)  # fmt: skip
def test_angles_are_in_fp32_or_better_and_the_result_has_the_dtype_of_x(dtype, angles):
    rope = RotaryEmbedding(4, 10000.0)
    cos, sin = rope.cos_sin(positions(3), dtype)
    assert (cos.dtype, sin.dtype) == (angles, angles)
    assert rotate(torch.ones(1, 1, 1, 4, dtype=dtype), cos, sin).dtype == dtype


def test_position_zero_turns_nothing():
    rope, x = RotaryEmbedding(8, 10000.0), torch.randn(1, 1, 2, 8)
    assert torch.equal(rotate(x, *rope.cos_sin(positions(0), x.dtype)), x)


def test_rotation_keeps_norms():
    rope, x = RotaryEmbedding(8, 10000.0), torch.randn(3, 1, 2, 8, dtype=torch.float64)
    rotated = rotate(x, *rope.cos_sin(positions(7, 1000, 2_000_000), x.dtype))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


def test_scores_depend_on_the_distance_alone_even_at_two_million():
    rope = RotaryEmbedding(16, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query, key):
        rotated = (rotate(t, *rope.cos_sin(positions(p), t.dtype)) for t, p in ((q, query), (k, key)))
        first, second = rotated
        return (first * second).sum()

    torch.testing.assert_close(score(2_000_123, 2_000_000), score(123, 0), rtol=0, atol=1e-8)


def test_each_sequence_of_a_batch_has_its_own_positions():
    rope, x = RotaryEmbedding(8, 10000.0), torch.randn(2, 2, 1, 8)
    places = torch.tensor([[0, 1], [9, 4]])
    rotated = rotate(x, *rope.cos_sin(places, x.dtype))
    for sequence in range(2):
        alone = rotate(x[:, sequence : sequence + 1], *rope.cos_sin(places[sequence : sequence + 1], x.dtype))
        assert torch.equal(rotated[:, sequence : sequence + 1], alone)


@pytest.mark.parametrize("heads, key_value_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("rotary", [True, False])
def test_a_projection_is_split_by_group_and_keys_come_before_values(heads, key_value_heads, rotary):
    per_group = heads // key_value_heads
    qkv = torch.randn(4, 2, key_value_heads, per_group + 2, 8, dtype=torch.float64)
    cos, sin = RotaryEmbedding(4, 10000.0).cos_sin(positions(3, 1, 4, 1).expand(2, 4), qkv.dtype)
    q, kv = split_and_rotate(qkv, cos, sin) if rotary else split_and_rotate(qkv, None, None)
    k, v = kv.chunk(2, 2)
    for group in range(key_value_heads):
        queries, key, value = qkv[:, :, group].split([per_group, 1, 1], 2)
        if rotary:
            queries, key = rotate(queries, cos, sin), rotate(key, cos, sin)
        assert torch.equal(q[:, :, group * per_group : (group + 1) * per_group], queries)
        assert torch.equal(k[:, :, group : group + 1], key)
        assert torch.equal(v[:, :, group : group + 1], value)
