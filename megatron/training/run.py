"""Parts of one run that its loop, its steps and its evaluations share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron.config import Config, Recompute, accumulation_steps
from megatron.core.sequence_layout import SequenceLayout
from megatron.engine.engine import Engine
from megatron.fpdt.stream import Stream
from megatron.initialize import Context
from megatron.logging.progress import StepProgress, StepWork
from megatron.monitoring.finite_check import FiniteCheck
from megatron.monitoring.loss_by_position import TokenLosses
from megatron.monitoring.loss_window import LossWindow
from megatron.monitoring.reporting import Reporter
from megatron.planner.flops import flops_of_streaming, forward_flops


@dataclass(frozen=True)
class Run:
    """One run: its settings, its place among the ranks, its engine, and what observes it."""

    config: Config
    context: Context
    engine: Engine
    stream: Stream
    progress: StepProgress
    reporter: Reporter
    losses: LossWindow
    token_losses: TokenLosses
    finite_check: FiniteCheck | None

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches of a step on one rank."""
        return accumulation_steps(self.config, self.context.parallel_state.world_size)


# Matrix products of the attention kernels in a backward pass over those in a forward pass, which has two.
_ATTENTION_BACKWARD = 2.5


def forward_work(
    config: Config, layout: SequenceLayout, num_microbatches: int, attention_share: float = 1.0
) -> StepWork:
    """Return the work of the forward passes over `num_microbatches` micro-batches, in FLOPs."""
    chunks = [sum(each) for each in _chunk_flops(config, layout, attention_share)]
    return StepWork(config.model.num_layers * num_microbatches * sum(chunks), chunks)


def step_work(
    config: Config, stream: Stream, layout: SequenceLayout, num_microbatches: int, attention_share: float = 1.0
) -> StepWork:
    """Return the work of one step, in FLOPs; `attention_share` is what documents leave of attention.

    Blocks that are not streamed report forward alone, as one chunk each.
    """
    forward = forward_work(config, layout, num_microbatches, attention_share)
    if not config.parallel.ds_sequence_parallel_fpdt:
        passes = 2 if config.deepspeed.deepspeed_activation_checkpointing else 1
        return replace(forward, total=passes * forward.total)
    model, saving = config.model, stream.saving_at(layout.sequence_length)
    # Attention's forward passes again report chunks of their own.
    recompute = saving.recompute if saving.recompute.saves_attention else Recompute.KV
    recomputed = flops_of_streaming(model, layout, stream.slice_length, replace(saving, recompute=recompute))
    token_wise = recomputed / forward_flops(model, 0, layout.sequence_length).token_wise
    token_wise += 2 if model.sizes.adapters is None else 1
    chunks = _chunk_flops(config, layout, attention_share)
    backward = [token_wise * tokens + _ATTENTION_BACKWARD * pairs for tokens, pairs in chunks]
    num_forward_passes = 1 if saving.recompute.saves_attention else 2
    total = num_forward_passes * forward.total + model.num_layers * num_microbatches * sum(backward)
    return StepWork(total, forward.forward, backward)


def _chunk_flops(config: Config, layout: SequenceLayout, attention_share: float) -> list[tuple[float, float]]:
    """Return the token-wise FLOPs of the forward pass of a layer, and those of attention, for each chunk.

    Attention that windows and documents limit counts as that of one window with the same share.
    """
    model, length, start = config.model, layout.sequence_length, 0
    flops, chunks = forward_flops(model, 0, length, attention_share), list[tuple[float, float]]()
    unseen = max(1 - model.sizes.attention_share(length, attention_share), 0.0)
    window = max(length * (1 - math.sqrt(unseen)), 1.0)

    def pairs_up_to(position: int) -> float:
        return position**2 if position <= window else (2 * position - window) * window

    for tokens in layout.chunk_lengths:
        pairs = (pairs_up_to(start + tokens) - pairs_up_to(start)) / pairs_up_to(length)
        chunks.append(
            (flops.token_wise * tokens / length / model.num_layers, flops.attention * pairs / model.num_layers)
        )
        start += tokens
    return chunks
