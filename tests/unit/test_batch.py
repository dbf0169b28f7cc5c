"""From samples to a rank's slices: inputs and labels are a token apart, and positions say where they were."""

import numpy as np
import pytest
import torch

from megatron.batch import slice_batch
from megatron.core.sequence_layout import SequenceLayout

LENGTH = 16
SAMPLES = [np.arange(LENGTH + 1, dtype=np.int64) + first for first in (100, 500, 900)]


def test_labels_are_the_tokens_that_follow() -> None:
    batch = slice_batch(SAMPLES, SequenceLayout(LENGTH, LENGTH), 0, pin=False)
    assert batch.tokens.tolist() == [sample[:-1].tolist() for sample in SAMPLES]
    assert batch.labels.tolist() == [sample[1:].tolist() for sample in SAMPLES]
    assert batch.positions.tolist() == [list(range(LENGTH))] * len(SAMPLES)


@pytest.mark.parametrize("chunk, size", [(16, 2), (8, 2), (12, 4)])
def test_the_slices_of_all_ranks_make_up_the_batch(chunk: int, size: int) -> None:
    layout = SequenceLayout(LENGTH, chunk, size)
    parts = [slice_batch(SAMPLES, layout, rank, pin=False) for rank in range(size)]
    positions, tokens, labels = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("positions", "tokens", "labels")
    )
    order = positions[0].argsort()
    assert positions[:, order].tolist() == [list(range(LENGTH))] * len(SAMPLES)
    assert tokens[:, order].tolist() == [sample[:-1].tolist() for sample in SAMPLES]
    assert labels[:, order].tolist() == [sample[1:].tolist() for sample in SAMPLES]


def test_a_rank_counts_the_tokens_of_the_whole_sequences() -> None:
    batch = slice_batch(SAMPLES, SequenceLayout(LENGTH, 8, 4), 3, pin=False)
    assert batch.num_tokens == len(SAMPLES) * LENGTH
    assert batch.tokens.shape == (len(SAMPLES), LENGTH // 4)
    assert batch.loss_mask.sum() == batch.tokens.numel()


def test_the_inputs_come_in_the_order_that_the_model_takes() -> None:
    batch = slice_batch(SAMPLES, SequenceLayout(LENGTH, 8, 2), 1, pin=False)
    tokens, labels, loss_mask, positions = batch.inputs()
    assert (tokens.dtype, labels.dtype, loss_mask.dtype, positions.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
    )
    assert tokens is batch.tokens
    assert labels is batch.labels
    assert loss_mask is batch.loss_mask
    assert positions is batch.positions
