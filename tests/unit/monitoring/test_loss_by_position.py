"""Losses by position: the direct sums in fp64, on every path and layout."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megatron.config.logging import LoggingConfig
from megatron.core.documents import Documents
from megatron.data.batch import Batch
from megatron.fpdt import loss as loss_module
from megatron.logging.log_line import Bucket
from megatron.monitoring.loss_by_position import LossByPosition, TokenLosses, bucket_edges
from tests.distributed.model_case import PADDED_VOCAB_SIZE, Case, build, global_batch, local_inputs, model_config
from tests.reference.reference_model import logits, random_state

BATCH, LENGTH = 2, 48
WHOLE = ((0, LENGTH),)
DOCUMENTS = (((0, 5), (5, 40), (40, 48)), ((0, 30), (30, 44)))  # the end of the second sequence is padding
EDGES = [0, 3, 6, 12, 24, 48]
CASES = [
    Case(),
    Case(sequence_parallel_size=2),
    Case(activation_checkpointing=True),
    Case(chunk_length=20),
    Case(chunk_length=20, offloading=True, sequence_parallel_size=2),
    Case(chunk_length=20, offloading=True, sequence_parallel_size=2, data_parallel_size=2),
]


def evaluate_rank(case: Case) -> tuple[float, list[Bucket]]:
    """(this rank's loss sum, all ranks' buckets) of two batches, which are the same."""
    token_losses = TokenLosses()
    model, parallel_state, layout = build(case, token_losses)
    model.load_state_dict(random_state(model_config(case), PADDED_VOCAB_SIZE, seed=3))
    positions = layout.owned_positions(parallel_state.sequence_parallel_rank)
    inputs = local_inputs(case, parallel_state.data_parallel_rank, positions)
    batch = Batch(
        *inputs,
        Documents(case.documents) if case.documents else None,
        num_tokens=0,
        squared_lengths=0,
        seq_length=LENGTH,
    )
    by_position = LossByPosition(EDGES, case.sequence_length, model.execution.stream, token_losses)
    three_tokens = PADDED_VOCAB_SIZE * BATCH * 3
    with torch.no_grad(), mock.patch.object(loss_module, "TILE_LOGITS", three_tokens):
        losses = [float(by_position.evaluate(batch, lambda inputs: model(*inputs))) for _ in range(2)]
    return sum(losses), by_position.buckets()


def direct_buckets(case: Case) -> list[Bucket]:
    """The buckets of one batch, from whole logits of each document by itself."""
    config, batch = model_config(case), global_batch(case)
    weights = random_state(config, PADDED_VOCAB_SIZE, seed=3)
    sums = torch.zeros(2, len(EDGES) - 1, dtype=torch.float64)
    for row, tokens in enumerate(batch.tokens):
        for start, end in (case.documents or (WHOLE,) * BATCH)[row % BATCH]:
            (z,) = logits(config, weights, tokens[None, start:end])
            losses = F.cross_entropy(z, batch.labels[row, start:end], reduction="none")
            mask = batch.loss_mask[row, start:end]
            for position in range(end - start):
                bucket = max(i for i, edge in enumerate(EDGES) if edge <= position)
                sums[:, bucket] += torch.stack([losses[position] * mask[position], mask[position]])
    return [Bucket(EDGES[i], EDGES[i + 1], float(loss / count), float(count)) for i, (loss, count) in enumerate(sums.T)]


@pytest.mark.parametrize("documents", [(), DOCUMENTS], ids=["sequences", "documents"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_path_arrives_at_the_direct_sums_and_they_make_up_the_loss(ranks, case, documents):
    case = replace(case, batch_size=BATCH, documents=documents)
    results = ranks.run(evaluate_rank, case, num_ranks=case.num_ranks)
    want = direct_buckets(case)
    for _, got in results:
        assert [(b.first, b.end, b.num_tokens) for b in got] == [(b.first, b.end, 2 * b.num_tokens) for b in want]
        assert [b.loss for b in got] == pytest.approx([b.loss for b in want], rel=1e-13)
        assert sum(b.loss * b.num_tokens for b in got) == pytest.approx(sum(loss for loss, _ in results), rel=1e-13)


def edges(style, count, length=1024):
    return bucket_edges(LoggingConfig(log_loss_by_position=style, loss_position_buckets=count), length)


def test_buckets_are_halved_towards_the_start_or_equal():
    assert edges("powers-of-two", 4) == [0, 128, 256, 512, 1024]
    assert edges("equal", 4) == [0, 256, 512, 768, 1024]
    assert edges("equal", 3, length=10) == [0, 3, 6, 10]


def test_there_are_no_more_buckets_than_positions():
    assert edges("powers-of-two", 16, length=4) == [0, 1, 2, 4]
    assert edges("equal", 16, length=4) == [0, 1, 2, 3, 4]


def test_without_buckets_evaluation_is_as_it_was(ranks):
    assert edges(None, 16) == []
    model, *_ = build(Case())
    nothing = LossByPosition([], LENGTH, model.execution.stream, TokenLosses())
    batch = Batch(
        *local_inputs(Case(), 0, torch.arange(LENGTH)), None, num_tokens=0, squared_lengths=0, seq_length=LENGTH
    )
    assert nothing.evaluate(batch, lambda inputs: inputs) == batch.inputs()
    assert nothing.buckets() == []
