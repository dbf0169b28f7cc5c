"""Parts of one run that its loop, its steps and its evaluations share."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import Config, accumulation_steps
from megatron.core.sequence_layout import SequenceLayout
from megatron.engine.engine import Engine
from megatron.fpdt.stream import Stream
from megatron.initialize import Context
from megatron.logging.progress import StepProgress
from megatron.monitoring.finite_check import FiniteCheck
from megatron.monitoring.loss_by_position import TokenLosses
from megatron.monitoring.loss_window import LossWindow
from megatron.monitoring.reporting import Reporter


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


def forward_units(config: Config, layout: SequenceLayout, num_microbatches: int) -> int:
    """Count the progress reports of the forward passes over `num_microbatches` micro-batches."""
    return config.model.num_layers * layout.num_chunks * num_microbatches


def step_units(config: Config, layout: SequenceLayout, num_microbatches: int) -> int:
    """Count the progress reports of one step: blocks that save their activations report forward alone."""
    recomputes = config.deepspeed.deepspeed_activation_checkpointing
    passes = 2 if recomputes or config.parallel.ds_sequence_parallel_fpdt else 1
    return passes * forward_units(config, layout, num_microbatches)
