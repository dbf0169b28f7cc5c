"""FLOP accounting: model FLOPs and hardware FLOPs of a step, and the throughput, MFU and HFU that follow.

Model FLOPs count what the mathematics of one training step needs and nothing that an implementation recomputes: every
matrix product once forward and twice backward, and causal attention as a triangle.

    matrix product of a token with a [n, m] weight     2 n m, of a token's experts only
    causal attention of one layer, forward             2 S^2 heads head_dim    (Q K^T and P V, 2 S^2 each, halved)
    backward                                           2 x forward

The weights of a model with adapters are frozen: their products run once backward, those of the adapters twice.

Where documents share a sequence, S^2 is the sum of the squares of their lengths: `attention_share` of the whole. In a
layer with a window of W tokens it is S^2 - (S - W)^2.

Hardware FLOPs add the forward work that the backward pass recomputes:

    activation checkpointing    every layer, attention included
    the streamed block          every product but the last, except those that were saved; and the products after
                                attention of each block whose output, the next block's input, is recomputed. With a
                                parallel residual attention's output product is a last one too. Experts are never saved
    recomputed attention        the whole forward pass of each block, without the products after attention of the
                                highest in a chain, whose keys and values are not recomputed another time. Of the inputs
                                of a chain of n blocks (n-1)/2 are recomputed once more, rounded down

The head and the loss run once on every path.

Neither counts the attention scores that every flash kernel recomputes inside its backward, as is usual.
"""

from dataclasses import dataclass

from megatron.config import ModelConfig, Recompute
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.stream import Saving


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
class TrainingFlops:
    """FLOPs of training on one sequence, as in the module's docstring."""

    model: int
    hardware: int


@dataclass(frozen=True)
class ThroughputReport:
    """Speed of one step. The utilizations are fractions of the device's peak, None where the peak is unknown."""

    tokens_per_second_per_gpu: float
    model_tflops_per_gpu: float
    mfu: float | None
    hfu: float | None


def forward_flops(
    model: ModelConfig, padded_vocab_size: int, seq_length: int, attention_share: float = 1.0
) -> ForwardFlops:
    """Return the FLOPs of the forward pass of one sequence of `seq_length` tokens."""
    sizes = model.sizes
    trained = sizes.adapters.weights if sizes.adapters else 0
    widths = model.num_attention_heads * (model.kv_channels + sizes.narrow_channels) * model.num_layers
    return ForwardFlops(
        token_wise=2 * seq_length * (sizes.token_weights.total + trained),
        attention=round(seq_length**2 * sizes.attention_share(seq_length, attention_share)) * widths,
        head=2 * seq_length * model.hidden_size * padded_vocab_size,
    )


def model_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int, attention_share: float = 1.0) -> int:
    """Return the model FLOPs of training on one sequence: forward and backward, without recomputation."""
    forward = forward_flops(model, padded_vocab_size, seq_length, attention_share)
    if model.sizes.adapters is None:
        return 3 * forward.total
    gradients = 2 * seq_length * model.sizes.adapters.weights
    return 2 * (forward.token_wise + forward.head) + gradients + 3 * forward.attention


def flops_of_checkpointing(model: ModelConfig, seq_length: int, attention_share: float = 1.0) -> int:
    """Return the FLOPs that activation checkpointing recomputes for one sequence."""
    forward = forward_flops(model, 0, seq_length, attention_share)
    return forward.token_wise + forward.attention


def flops_of_recomputed_attention(
    model: ModelConfig,
    seq_length: int,
    checkpoint_interval: int,
    recompute: Recompute,
    attention_share: float = 1.0,
) -> ForwardFlops:
    """Return the FLOPs of the forward passes that the streamed blocks recompute for their attention outputs."""
    if recompute.saves_attention:
        return ForwardFlops(0, 0, 0)
    forward = forward_flops(model, 0, seq_length, attention_share)
    chains = -(-model.num_layers // checkpoint_interval)
    highest = 2 * seq_length * model.sizes.token_weights.after * chains // model.num_layers
    return ForwardFlops(forward.token_wise - highest, forward.attention, 0)


def flops_of_streaming(
    model: ModelConfig,
    layout: SequenceLayout,
    slice_length: int,
    saving: Saving,
    attention_share: float = 1.0,
) -> int:
    """Return the FLOPs that the streamed blocks recompute for one sequence.

    Where products after attention are saved, those of the first `slice_length` tokens of a rank in each chunk are
    recomputed all the same, but for the share that is saved on the device. Keys and values that are not saved are
    recomputed once more for all chunks but the last.
    """
    recompute, checkpoint_interval = saving.recompute, saving.checkpoint_interval
    seq_length, weights = layout.sequence_length, model.sizes.token_weights
    in_first_slices = seq_length - layout.sequence_parallel_size * layout.tokens_after(slice_length)
    again = round(in_first_slices * (1 - saving.device_budget.first_slices))
    recomputed = (again if recompute.saves_products else seq_length) * weights.output
    recomputed += (again if recompute.saves_mlp_products else seq_length) * weights.mlp
    recomputed += seq_length * weights.unsaved
    recomputed += 0 if recompute.saves_products else seq_length * weights.before
    num_layers = model.num_layers
    chains = -(-num_layers // checkpoint_interval)
    rebuilt_blocks = num_layers - chains
    if not recompute.saves_keys_and_values:
        blocks = num_layers if recompute.saves_attention else num_layers - chains
        recomputed += (seq_length - layout.chunk_lengths[-1]) * weights.before * blocks // num_layers
    if not recompute.saves_attention:
        whole, rest = divmod(num_layers, checkpoint_interval)
        rebuilt_blocks = whole * ((checkpoint_interval - 1) // 2) + max(rest - 1, 0) // 2
    forward = flops_of_recomputed_attention(model, seq_length, checkpoint_interval, recompute, attention_share)
    return forward.total + 2 * (recomputed + seq_length * weights.after * rebuilt_blocks // num_layers)


def throughput(
    *,
    tokens: float,
    seq_length: float,
    seconds: float,
    num_gpus: int,
    flops_per_sequence: TrainingFlops,
    peak_tflops: float | None,
) -> ThroughputReport:
    """Return the throughput of `num_gpus` devices that trained on `tokens` tokens in `seconds`.

    `peak_tflops` is one device's dense peak in TFLOP/s; without it the utilizations are None.
    """
    sequences_per_second_per_gpu = tokens / seq_length / seconds / num_gpus
    model_tflops = sequences_per_second_per_gpu * flops_per_sequence.model / 1e12
    hardware_tflops = sequences_per_second_per_gpu * flops_per_sequence.hardware / 1e12
    return ThroughputReport(
        tokens_per_second_per_gpu=tokens / seconds / num_gpus,
        model_tflops_per_gpu=model_tflops,
        mfu=model_tflops / peak_tflops if peak_tflops else None,
        hfu=hardware_tflops / peak_tflops if peak_tflops else None,
    )
