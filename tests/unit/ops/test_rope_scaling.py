"""Scaled rotary embeddings against Hugging Face's, which are patched to compute in fp64 here."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from megatron.config import ModelConfig
from megatron.model.rotary import build_rotary
from megatron.ops.rope import RotaryEmbedding
from megatron.ops.rope_scaling import DynamicRotaryEmbedding, LinearRotaryEmbedding, YarnRotaryEmbedding

HEAD_SIZES = (4, 16, 64, 128)
THETAS = (10.0, 1e4, 5e5, 1e7)
ORIGINAL = 8192
POSITIONS = torch.tensor([[0, 1, 7, 8191, 8192, 65_535, 131_072, 1_048_575, 4_194_303]])
LENGTH = 4_194_304  # what the last position makes the longest that Hugging Face's dynamic scaling has seen


@dataclass(frozen=True)
class Scaling:
    """A kind of scaling and its parameters by Hugging Face's names."""

    kind: str
    factor: float
    further: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.kind, f"{self.factor:g}", *(f"{name}{value:g}" for name, value in self.further)])


SCALINGS = [
    *(Scaling(kind, factor) for kind in ("linear", "dynamic", "yarn") for factor in (1.0, 2.5, 16.0, 512.0)),
    Scaling("yarn", 16.0, (("beta_fast", 20.0), ("beta_slow", 2.0))),
    Scaling("yarn", 16.0, (("beta_fast", 1.001), ("beta_slow", 1.0))),
    Scaling("yarn", 16.0, (("beta_fast", 1000.0),)),
    Scaling("yarn", 16.0, (("attention_factor", 0.7),)),
    Scaling("yarn", 40.0, (("mscale", 1.0), ("mscale_all_dim", 0.7))),
    Scaling("yarn", 1.0, (("mscale", 1.0), ("mscale_all_dim", 0.7))),
    *(Scaling("llama3", factor, (("low_freq_factor", 1.0), ("high_freq_factor", 4.0))) for factor in (1.0, 8.0, 32.0)),
    Scaling("llama3", 16.0, (("low_freq_factor", 2.0), ("high_freq_factor", 32.0))),
]


def our_rotary(scaling: Scaling, head_size: int, theta: float, percent: float = 1.0) -> RotaryEmbedding:
    """The embedding of a configuration with the same parameters."""
    needs_context = scaling.kind != "linear"
    rotary = build_rotary(
        ModelConfig(
            num_layers=1,
            hidden_size=head_size,
            num_attention_heads=1,
            kv_channels=head_size,
            seq_length=LENGTH,
            use_rotary_position_embeddings=True,
            rotary_percent=percent,
            rotary_position_embeddings_theta=theta,
            rope_scaling_type=scaling.kind,
            rope_scaling_factor=scaling.factor,
            rope_scaling_original_max_position_embeddings=ORIGINAL if needs_context else None,
            **{f"rope_scaling_{name}": value for name, value in scaling.further},
        )
    )
    assert rotary is not None
    return rotary


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what asks for fp32 have fp64: fp32 angles are off by a tenth of a radian at two million tokens."""
    pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    pytest.importorskip("transformers.models.llama.modeling_llama")
    pytest.importorskip("safetensors.torch")  # its tables of dtypes would have fp64 under the name of fp32 for good
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def their_cos_sin(scaling: Scaling, head_size: int, theta: float, percent: float = 1.0):
    """cos and sin [S, R/2] of Hugging Face; GPT-NeoX's embedding rotates a share of each head."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor, **dict(scaling.further)}
    if scaling.kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = ORIGINAL
    sizes = {"hidden_size": head_size, "num_attention_heads": 1, "rope_parameters": parameters}
    sizes["max_position_embeddings"] = ORIGINAL if scaling.kind == "dynamic" else LENGTH
    if percent < 1:
        parameters["partial_rotary_factor"] = percent
        rotary = GPTNeoXRotaryEmbedding(transformers.GPTNeoXConfig(**sizes))
    else:
        rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(head_dim=head_size, **sizes))
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), POSITIONS)
    return cos[0].chunk(2, -1)[0], sin[0].chunk(2, -1)[0]


def assert_the_same(ours: RotaryEmbedding, theirs) -> None:
    for got, want in zip(ours.cos_sin(POSITIONS, torch.float64), theirs, strict=True):
        assert want.dtype == torch.float64
        torch.testing.assert_close(got[:, 0, 0], want, rtol=0, atol=2e-8)  # four million tokens times fp64's rounding


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("theta", THETAS)
def test_cos_and_sin_are_hugging_face_s_up_to_millions_of_tokens(
    double_precision: None, scaling: Scaling, head_size: int, theta: float
) -> None:
    assert_the_same(our_rotary(scaling, head_size, theta), their_cos_sin(scaling, head_size, theta))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_share_of_each_head_is_scaled_as_hugging_face_does(double_precision: None, scaling: Scaling) -> None:
    assert_the_same(our_rotary(scaling, 64, 1e4, 0.25), their_cos_sin(scaling, 64, 1e4, 0.25))


def test_linear_scaling_is_position_interpolation() -> None:
    linear, plain = LinearRotaryEmbedding(64, 1e4, factor=4.0), RotaryEmbedding(64, 1e4)
    places = torch.arange(0, 4_000_000, 399_996)[None]
    for got, want in zip(linear.cos_sin(places, torch.float64), plain.cos_sin(places // 4, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [1, 4096, 8192])
def test_dynamic_scaling_changes_nothing_up_to_the_original_context(length: int) -> None:
    rotary = DynamicRotaryEmbedding(64, 1e4, factor=8.0, original_length=8192, length=length)
    assert torch.equal(
        rotary.frequencies(torch.device("cpu")), RotaryEmbedding(64, 1e4).frequencies(torch.device("cpu"))
    )


def test_the_attention_factor_of_yarn_multiplies_cos_and_sin() -> None:
    lone, doubled = (YarnRotaryEmbedding(64, 1e4, 8.0, 8192, 32.0, 1.0, factor) for factor in (1.0, 2.0))
    for one, two in zip(*(rotary.cos_sin(POSITIONS, torch.float64) for rotary in (lone, doubled)), strict=True):
        assert torch.equal(2 * one, two)
