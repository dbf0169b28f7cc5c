"""Slicing of samples for a rank: labels are inputs shifted by a token, and positions are those of the tokens."""

import numpy as np
import pytest
import torch

from megatron.core.sequence_layout import SequenceLayout
from megatron.data.batch import EndOfDocument, Sample, slice_batch

LENGTH = 16
TOKENS = [np.arange(LENGTH + 1, dtype=np.int64) + first for first in (100, 500, 900)]
SAMPLES = [Sample(tokens) for tokens in TOKENS]


def test_labels_are_the_tokens_that_follow() -> None:
    batch = slice_batch(SAMPLES, SequenceLayout(LENGTH, LENGTH), 0, pin=False)
    assert batch.tokens.tolist() == [sample[:-1].tolist() for sample in TOKENS]
    assert batch.labels.tolist() == [sample[1:].tolist() for sample in TOKENS]
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
    assert tokens[:, order].tolist() == [sample[:-1].tolist() for sample in TOKENS]
    assert labels[:, order].tolist() == [sample[1:].tolist() for sample in TOKENS]


def test_a_rank_counts_the_tokens_of_the_whole_sequences() -> None:
    batch = slice_batch(SAMPLES, SequenceLayout(LENGTH, 8, 4), 3, pin=False)
    assert batch.num_tokens == len(SAMPLES) * LENGTH
    assert batch.tokens.shape == (len(SAMPLES), LENGTH // 4)
    assert batch.loss_mask.sum() == batch.tokens.numel()


def test_the_inputs_come_in_the_order_that_the_model_takes() -> None:
    batch = slice_batch(SAMPLES, SequenceLayout(LENGTH, 8, 2), 1, pin=False)
    tokens, labels, loss_mask, positions, documents = batch.inputs()
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
    assert documents is None


END = 0
# Documents of 3, 1 and 6 tokens, and the first 6 of a longer one; the last label is an end.
MARKED = np.array([5, 6, END, END, 7, 8, 9, 1, 2, END, 3, 4, 5, 6, 7, 8, END])
SPANS = ((0, 3), (3, 4), (4, 10), (10, 16))


def test_a_document_ends_with_its_end_and_a_last_label_ends_none() -> None:
    sample = EndOfDocument(END, reset_attention_mask=True).sample(MARKED)
    assert sample.documents == SPANS
    assert sample.loss_spans is None


def test_an_end_as_the_last_input_begins_no_empty_document() -> None:
    sample = EndOfDocument(END, reset_position_ids=True).sample(np.array([1, END, 2, END, 3]))
    assert sample.documents == ((0, 2), (2, 4))


def test_without_flags_an_end_is_a_token_like_any_other() -> None:
    assert EndOfDocument(END).sample(MARKED) == Sample(MARKED)


def test_what_follows_an_end_does_not_count() -> None:
    sample = EndOfDocument(END, eod_mask_loss=True).sample(MARKED)
    assert sample.loss_spans is not None
    assert sample.loss_spans.tolist() == [[0, 2], [3, 3], [4, 9], [10, 16]]
    assert slice_batch([sample, Sample(MARKED)], SequenceLayout(LENGTH, 8, 2), 1, pin=False).num_tokens == 13 + 16


@pytest.mark.parametrize("chunk, size", [(16, 1), (8, 2), (12, 4)])
def test_positions_restart_and_masks_follow_the_tokens_on_every_rank(chunk: int, size: int) -> None:
    layout = SequenceLayout(LENGTH, chunk, size)
    sample = EndOfDocument(END, reset_position_ids=True, eod_mask_loss=True).sample(MARKED)
    for rank in range(size):
        batch, owned = slice_batch([sample], layout, rank, pin=False), layout.owned_positions(rank)
        expected = torch.cat([torch.arange(end - start) for start, end in SPANS])
        assert torch.equal(batch.positions[0], expected[owned])
        assert torch.equal(batch.loss_mask[0], (torch.from_numpy(MARKED)[owned] != END).float())


def test_documents_and_positions_can_be_asked_for_apart() -> None:
    sample, layout = EndOfDocument(END, reset_attention_mask=True).sample(MARKED), SequenceLayout(LENGTH, 8)
    batch = slice_batch([sample, Sample(MARKED)], layout, 0, pin=False, restart_positions=False)
    assert batch.positions.tolist() == [list(range(LENGTH))] * 2
    assert batch.documents is not None
    assert batch.documents.spans == (SPANS, ((0, LENGTH),))
    assert batch.squared_lengths == 9 + 1 + 36 + 36 + LENGTH**2
    batch = slice_batch([sample], layout, 0, pin=False, separate_documents=False)
    assert batch.documents is None
    assert batch.squared_lengths == LENGTH**2


def test_one_document_that_fills_every_sequence_needs_no_separation() -> None:
    sample = EndOfDocument(END, reset_attention_mask=True).sample(TOKENS[0])
    assert slice_batch([sample], SequenceLayout(LENGTH, 8), 0, pin=False).documents is None


def test_padding_before_the_first_document_has_positions_like_any_other() -> None:
    sample = Sample(MARKED, documents=((4, 10), (12, 16)))
    batch = slice_batch([sample], SequenceLayout(LENGTH, 8), 0, pin=False)
    assert batch.positions.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]


class Recorder:
    """Tokens that record which spans were read."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens
        self.spans: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, span: slice) -> np.ndarray:
        self.spans.append((span.start, span.stop))
        return self._tokens[span]


def test_a_rank_reads_its_slices_and_the_token_after_each() -> None:
    tokens = Recorder(MARKED)
    slice_batch([EndOfDocument(END).sample(tokens)], SequenceLayout(LENGTH, 8, 2), 1, pin=False)
    assert tokens.spans == [(4, 9), (12, 17)]


def test_looking_for_ends_reads_the_inputs_once_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.tokens.BLOCK_TOKENS", 6)
    tokens = Recorder(MARKED)
    sample = EndOfDocument(END, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True).sample(tokens)
    assert tokens.spans == [(0, 6), (6, 12), (12, 16)]
    slice_batch([sample], SequenceLayout(LENGTH, LENGTH, 2), 1, pin=False)
    assert tokens.spans[3:] == [(8, 15), (14, 17)]


def from_whole_sequences(tokens: np.ndarray, flags: EndOfDocument, owned: np.ndarray) -> list[list[float]]:
    """Slice a rank's tokens, labels, loss mask and positions from arrays of the whole sample."""
    inputs, labels = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    positions = np.arange(len(inputs))
    if flags.reset_position_ids:
        for end in np.flatnonzero(inputs == flags.token).tolist():
            positions[end + 1 :] = np.arange(len(inputs) - end - 1)
    mask = inputs != flags.token if flags.eod_mask_loss else np.ones(len(inputs))
    return [part[owned].tolist() for part in (inputs, labels, mask, positions)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("block_tokens", [1, 5, 1000])
@pytest.mark.parametrize("length, chunk, size", [(24, 24, 1), (24, 8, 2), (24, 16, 4), (20, 12, 2), (8, 64, 8)])
def test_a_rank_has_what_whole_sequences_hold_at_its_positions(
    monkeypatch: pytest.MonkeyPatch, dtype: type, block_tokens: int, length: int, chunk: int, size: int
) -> None:
    monkeypatch.setattr("megatron.data.tokens.BLOCK_TOKENS", block_tokens)
    random, layout = np.random.default_rng(length + chunk), SequenceLayout(length, chunk, size)
    for resets, masks in ((False, False), (True, False), (False, True), (True, True)):
        flags = EndOfDocument(END, reset_position_ids=resets, eod_mask_loss=masks)
        samples = [random.integers(END, 5, length + 1).astype(dtype) for _ in range(3)]
        for rank in range(size):
            batch = slice_batch([flags.sample(tokens) for tokens in samples], layout, rank, pin=False)
            owned = layout.owned_positions(rank).numpy()
            for row, tokens in enumerate(samples):
                found = [part[row].tolist() for part in (batch.tokens, batch.labels, batch.loss_mask, batch.positions)]
                assert found == from_whole_sequences(tokens, flags, owned)
            ends = sum(int((tokens[:-1] == END).sum()) for tokens in samples)
            assert batch.num_tokens == 3 * length - (ends if masks else 0)
