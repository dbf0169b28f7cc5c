"""One optimizer step: what the ranks agree on before it, and the checks before the weights change."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpointing.train_state import TrainState
from megatron.config import global_batch_size
from megatron.core.sequence_layout import SequenceLayout
from megatron.data.batch import Batch, ModelInputs
from megatron.data.errors import DataError
from megatron.monitoring.finite_check import HOW_TO_RESUME, NotFiniteError
from megatron.monitoring.profiling import StepProfiler
from megatron.training.rollback import Rollback
from megatron.training.run import Run, step_work
from megatron.training.wall_clock import Due


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know alike of a step before they take it.

    `seq_length` counts the tokens of each of its sequences. `num_tokens`, fp32 on the device, counts its unmasked
    tokens. `attention_share` is the share of attention that its documents leave. `due` is what follows it.
    """

    seq_length: int
    num_tokens: Tensor
    has_tokens: bool
    attention_share: float
    due: Due

    @classmethod
    def over_ranks(cls, batches: Sequence[Batch], due: Due, run: Run) -> StepTotals:
        """Sum up this rank's micro-batches over all ranks, and agree on what is due. Collective over them.

        Every rank may ask for the end; for the rest rank 0's clock counts. DataError where the sequences of the step
        differ in length.
        """
        parallel = run.context.parallel_state
        length = batches[0].seq_length
        if parallel.rank:
            due = Due(stop=due.stop)
        own = torch.tensor(
            [
                sum(batch.num_tokens for batch in batches),
                sum(batch.squared_lengths for batch in batches),
                statistics.mean(batch.seq_length for batch in batches),
                *(due.stop, due.log, due.evaluate, due.save),
            ],
            dtype=torch.float64,
        )
        own[:2] /= parallel.sequence_parallel_size  # every rank of a sequence counts the whole of it
        totals = own.to(run.context.device)
        dist.all_reduce(totals)
        num_tokens, squared_lengths, lengths, *asked = totals.tolist()
        if lengths != length * parallel.world_size:
            raise DataError(
                f"the sequences of one step differ in length: {length} tokens on rank {parallel.rank}, "
                f"{lengths / parallel.world_size:g} on average; the data of the ranks are not the same."
            )
        whole = global_batch_size(run.config, parallel.world_size) * length**2
        due = Due(*(num_ranks > 0 for num_ranks in asked))
        return cls(length, totals[0].float(), num_tokens > 0, squared_lengths / whole, due)


class OptimizerStep:
    """Takes the optimizer steps of a run, and checks each before the weights change."""

    def __init__(self, run: Run, rollback: Rollback, profiler: StepProfiler) -> None:
        self._run, self._rollback, self._profiler = run, rollback, profiler

    def take(self, batches: Sequence[Batch], totals: StepTotals, learning_rate: float, state: TrainState) -> Tensor:
        """Take the step that follows `state`; return its mean token loss. Collective over all ranks.

        NotFiniteError where a loss or gradient is not finite, and no rollback takes it.
        """
        run, iteration = self._run, state.iteration + 1
        layout = run.stream.layout_of(totals.seq_length)
        work = step_work(run.config, run.stream, layout, run.num_microbatches, totals.attention_share)
        run.progress.start_step(iteration, work)
        with self._profiler.step(iteration):
            loss = run.engine.train_step(
                self._inputs(batches), totals.num_tokens, learning_rate, partial(self._check, state, layout)
            )
        run.progress.finish_step()
        dist.all_reduce(loss)
        return loss / totals.num_tokens

    def _inputs(self, batches: Sequence[Batch]) -> Iterator[ModelInputs]:
        for number, batch in enumerate(batches):
            if self._run.finite_check:
                self._run.finite_check.start_microbatch(number)
            yield batch.inputs()

    def _check(self, state: TrainState, layout: SequenceLayout, loss: Tensor) -> None:
        """Check loss and gradients for NaN and infinity before the step is taken. Collective over all ranks.

        NotFiniteError where `loss`, this rank's, or a gradient of any rank is not finite, unless the loss scaler will
        skip the step and try a smaller scale.
        """
        run = self._run
        fault = run.finite_check.finish(loss, layout) if run.finite_check else None
        precision = run.config.precision
        is_scaled = precision.fp16 and (precision.loss_scale or run.engine.loss_scale > precision.min_loss_scale)
        if fault is None or is_scaled:
            return
        fault = f"{describe_next_step(state)}: the loss or gradient is not finite; {fault}"
        if not self._rollback.takes_faults:
            raise NotFiniteError(f"{fault}. The step is not taken and nothing is saved: {HOW_TO_RESUME}.")
        self._rollback.take_fault(fault)


def describe_next_step(state: TrainState) -> str:
    """Name the step that follows `state`, and its samples."""
    first = state.data_samples
    return f"iteration {state.iteration + 1} (samples {first} to {first + state.global_batch_size - 1})"
