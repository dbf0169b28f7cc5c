import pytest
import torch
import torch.nn.functional as F

from megatron.model.initialization import Initializer
from megatron.model.layers import MLP, Linear, SelfAttention, build_norm, head_layout
from megatron.model.rotary import rotary_size
from megatron.ops.attention import AttentionUnavailable
from tests.unit.model.small_model import small_config


def initializer(dtype=torch.float64):
    return Initializer(torch.Generator().manual_seed(0), dtype, torch.device("cpu"), std=0.5, residual_std=0.1)


@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1, 3.0])
def test_a_norm_honors_its_epsilon(normalization, epsilon):
    config = small_config(normalization=normalization, layernorm_epsilon=epsilon)
    x = torch.randn(5, 2, config.hidden_size, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if normalization == "layernorm" else x
    want = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    torch.testing.assert_close(build_norm(config, initializer())(x), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("normalization, names", [("layernorm", ["weight", "bias"]), ("rmsnorm", ["weight"])])
def test_an_rms_norm_has_no_bias_and_a_norm_has_the_model_s_dtype(normalization, names):
    norm = build_norm(small_config(normalization=normalization), initializer(torch.bfloat16))
    assert [name for name, _ in norm.named_parameters()] == names
    assert {p.dtype for p in norm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_x_w_transposed_plus_b(bias):
    linear, x = Linear(3, 5, initializer(), bias), torch.randn(2, 3, dtype=torch.float64)
    if bias:
        torch.nn.init.normal_(linear.bias)
    want = x @ linear.weight.T + (linear.bias if bias else 0)
    torch.testing.assert_close(linear(x), want)
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"][: 1 + bias]


def test_linear_takes_the_weight_of_another_module():
    weight = torch.nn.Parameter(torch.ones(5, 3))
    assert Linear(3, 5, initializer(), False, weight=weight).weight is weight


@pytest.mark.parametrize("swiglu, openai_gelu", [(True, False), (False, False), (False, True)])
def test_the_mlp_is_swiglu_or_gelu(swiglu, openai_gelu):
    config = small_config(swiglu=swiglu, openai_gelu=openai_gelu)
    mlp, x = MLP(config, initializer()), torch.randn(4, 1, config.hidden_size, dtype=torch.float64)
    hidden = x @ mlp.dense_h_to_4h.weight.T
    if swiglu:
        width = config.ffn_hidden_size
        hidden = hidden[..., :width] * hidden[..., :width].sigmoid() * hidden[..., width:]
    else:
        hidden = F.gelu(hidden, approximate="tanh" if openai_gelu else "none")
    torch.testing.assert_close(mlp(x), hidden @ mlp.dense_4h_to_h.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads, key_value_heads, head_size", [(4, 4, 6), (4, 2, 16), (6, 1, 4), (4, 2, 2)])
def test_rows_of_the_projection_are_by_group_its_queries_its_key_its_value(heads, key_value_heads, head_size):
    """Heads may be wider or narrower than hidden/heads."""
    config = small_config(
        num_attention_heads=heads, num_key_value_heads=key_value_heads, kv_channels=head_size, rotary_percent=1.0
    )
    attention = SelfAttention(config, initializer())
    x = torch.randn(3, 2, config.hidden_size, dtype=torch.float64)
    q, kv = attention.project(x, torch.zeros(2, 3, dtype=torch.int64))
    assert q.shape == (3, 2, heads, head_size)
    assert kv.shape == (3, 2, 2 * key_value_heads, head_size)
    k, v = kv.chunk(2, 2)
    rows = iter(attention.query_key_value.weight.split(head_size))
    per_group = heads // key_value_heads
    for group in range(key_value_heads):
        for head in range(group * per_group, (group + 1) * per_group):
            torch.testing.assert_close(q[:, :, head], x @ next(rows).T)
        torch.testing.assert_close(k[:, :, group], x @ next(rows).T)
        torch.testing.assert_close(v[:, :, group], x @ next(rows).T)
    assert next(rows, None) is None
    assert attention.dense.weight.shape == (config.hidden_size, heads * head_size)


@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
def test_queries_and_keys_are_normalized_before_they_are_rotated(normalization):
    """Rotation keeps lengths, and the norm of every head is the same: the value alone keeps its size."""
    config = small_config(normalization=normalization, qk_layernorm=True, layernorm_epsilon=1e-12)
    attention = SelfAttention(config, initializer())
    torch.nn.init.constant_(attention.k_layernorm.weight, 3.0)
    x, positions = torch.randn(4, 1, config.hidden_size, dtype=torch.float64), torch.tensor([[0, 5, 5, 2_000_000]])
    q, kv = attention.project(x, positions)
    k, v = kv.chunk(2, 2)
    length = config.kv_channels**0.5
    torch.testing.assert_close(q.norm(dim=-1), torch.full(q.shape[:-1], length, dtype=torch.float64))
    torch.testing.assert_close(k.norm(dim=-1), torch.full(k.shape[:-1], 3 * length, dtype=torch.float64))
    plain = SelfAttention(small_config(), initializer())
    assert torch.equal(v, plain.project(x, positions)[1].chunk(2, 2)[1])


def test_queries_and_keys_turn_with_their_positions_and_values_do_not():
    config = small_config()
    attention, x = SelfAttention(config, initializer()), torch.ones(4, 1, config.hidden_size, dtype=torch.float64)
    q, kv = attention.project(x, torch.tensor([[0, 5, 5, 2_000_000]]))
    k, v = kv.chunk(2, 2)
    for t in (q, k):
        assert torch.equal(t[1], t[2])
        assert not torch.allclose(t[0], t[1])
    assert torch.equal(v, v[:1].expand_as(v))


@pytest.mark.parametrize(
    "kv_channels, percent, expected",
    [(8, 1.0, 8), (16, 0.25, 4), (128, 0.5, 64), (80, 0.4, 32), (64, 0.75, 48), (10, 0.6, 6)],
)
def test_rotary_percent_is_a_share_of_the_head(kv_channels, percent, expected):
    assert rotary_size(small_config(kv_channels=kv_channels, rotary_percent=percent)) == expected


def test_without_rotary_positions_nothing_turns():
    config = small_config(use_rotary_position_embeddings=False)
    attention, x = SelfAttention(config, initializer()), torch.ones(2, 1, config.hidden_size, dtype=torch.float64)
    q, _ = attention.project(x, torch.tensor([[0, 7]]))
    assert attention.rotary is None
    assert torch.equal(q[0], q[1])


def test_attention_dropout_is_refused_where_ranks_share_the_rows_of_a_head():
    config = small_config(num_attention_heads=6, num_key_value_heads=2, attention_dropout=0.1)
    assert head_layout(config, 3).num_heads == 6
    with pytest.raises(AttentionUnavailable, match=r"--attention-dropout \(0.1\) .* as 4 ranks do .*-size 1, 2, 3, 6$"):
        head_layout(config, 4)
