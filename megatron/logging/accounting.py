"""Accounting: how much useful arithmetic a step does, and how fast the device did it.

Model FLOPs count what the mathematics of one training step needs and nothing that an implementation repeats: every
matrix product once forward and twice backward, and causal attention once, as the triangle it is.

    matrix product of a token with a [n, m] weight     2 n m
    causal attention of one layer, forward             2 S^2 heads head_dim    (Q K^T and P V, 2 S^2 each, halved)
    backward                                           2 x forward

Hardware FLOPs add the forward work that the backward pass runs again, so that the two are never confused:

    nothing       activations are kept
    token-wise    the streamed block re-runs `before` and `after`; attention, the head and the loss run once
    layers        activation checkpointing re-runs every layer, attention included; the head and the loss run once

The attention scores that every flash kernel rebuilds inside its backward are counted in neither, as is usual.
"""

from dataclasses import dataclass
from enum import Enum

from megatron.config.model import ModelConfig


class Recompute(Enum):
    """Which part of the forward pass the backward pass runs again."""

    NOTHING = "nothing"
    TOKEN_WISE = "token-wise"
    LAYERS = "layers"


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one sequence's forward pass, by kind of work."""

    token_wise: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.token_wise + self.attention + self.head


@dataclass(frozen=True)
class ThroughputReport:
    """Speed of one step. The utilisations are shares of the device's peak, None where the peak is unknown."""

    tokens_per_second_per_gpu: float
    model_tflops_per_gpu: float
    mfu: float | None
    hfu: float | None


def forward_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> ForwardFlops:
    """Return the FLOPs of the forward pass of one sequence of `seq_length` tokens."""
    query_width = model.num_attention_heads * model.kv_channels
    key_value_width = model.num_key_value_heads * model.kv_channels
    projections = model.hidden_size * (2 * query_width + 2 * key_value_width)
    mlp = model.hidden_size * model.ffn_hidden_size * (3 if model.swiglu else 2)
    return ForwardFlops(
        token_wise=2 * seq_length * model.num_layers * (projections + mlp),
        attention=2 * seq_length**2 * query_width * model.num_layers,
        head=2 * seq_length * model.hidden_size * padded_vocab_size,
    )


def model_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> int:
    """Return the FLOPs that training on one sequence needs: forward and backward, nothing twice."""
    return 3 * forward_flops(model, padded_vocab_size, seq_length).total


def hardware_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int, recompute: Recompute) -> int:
    """Return the FLOPs that training on one sequence runs, `recompute` included."""
    forward = forward_flops(model, padded_vocab_size, seq_length)
    repeated = {
        Recompute.NOTHING: 0,
        Recompute.TOKEN_WISE: forward.token_wise,
        Recompute.LAYERS: forward.token_wise + forward.attention,
    }
    return 3 * forward.total + repeated[recompute]


def throughput(
    *,
    tokens: int,
    seq_length: int,
    seconds: float,
    num_gpus: int,
    model_flops_per_sequence: int,
    hardware_flops_per_sequence: int,
    peak_tflops: float | None,
) -> ThroughputReport:
    """Return the speed of `num_gpus` devices that trained on `tokens` tokens in `seconds`.

    `peak_tflops` is one device's dense peak in TFLOP/s; without it the utilisations are None.
    """
    sequences_per_second_per_gpu = tokens / seq_length / seconds / num_gpus
    model_tflops = sequences_per_second_per_gpu * model_flops_per_sequence / 1e12
    hardware_tflops = sequences_per_second_per_gpu * hardware_flops_per_sequence / 1e12
    return ThroughputReport(
        tokens_per_second_per_gpu=tokens / seconds / num_gpus,
        model_tflops_per_gpu=model_tflops,
        mfu=model_tflops / peak_tflops if peak_tflops else None,
        hfu=hardware_tflops / peak_tflops if peak_tflops else None,
    )
