"""Evaluation on the validation or the test data: their mean token loss, also by position in the context."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron.monitoring.loss_by_position import LossByPosition, bucket_edges
from megatron.training.data import Part, TrainingData
from megatron.training.run import Run, forward_work


def evaluate(run: Run, data: TrainingData, part: Part, iteration: int) -> None:
    """Evaluate on the first samples of a part, if it has any, and write the result. Collective over all ranks."""
    if not data.has(part):
        return
    with run.reporter.pause():
        _evaluate(run, data, part, iteration)


def _evaluate(run: Run, data: TrainingData, part: Part, iteration: int) -> None:
    logging, length, num_steps = run.config.logging, run.config.model.seq_length, run.config.training.eval_iters
    work = forward_work(run.config, run.stream.layout_of(length), num_steps * run.num_microbatches)
    run.progress.start_step(iteration, work)
    totals = torch.zeros(2, dtype=torch.float64, device=run.context.device)  # sum of losses, unmasked tokens
    by_position = LossByPosition(bucket_edges(logging, length), length, run.stream, run.token_losses)
    with data.read(part, 0, num_steps) as batches:
        for batch in batches:
            totals[0] += by_position.evaluate(batch, run.engine.evaluate)
            totals[1] += batch.num_tokens / run.context.parallel_state.sequence_parallel_size
    run.progress.finish_step()
    dist.all_reduce(totals)
    loss_sum, num_tokens = totals.tolist()
    if not num_tokens:
        run.context.log.warning("every label of the %s data that were read is masked: they have no loss", part)
        return
    run.reporter.evaluation(iteration, loss_sum / num_tokens, part, by_position.buckets())
