"""Which tokens a rank owns: every token once, chunks contiguous over the ranks, and sizes that do not fit refused."""

import pytest
import torch

from megatron.core.sequence_layout import SequenceLayout

LAYOUTS = [(64, 64, 1), (64, 16, 1), (64, 24, 4), (48, 16, 2), (12, 64, 4), (10, 4, 2)]


@pytest.mark.parametrize("length, chunk, size", LAYOUTS)
def test_the_ranks_own_every_position_exactly_once(length: int, chunk: int, size: int) -> None:
    layout = SequenceLayout(length, chunk, size)
    owned = torch.cat([layout.owned_positions(rank) for rank in range(size)])
    assert sorted(owned.tolist()) == list(range(length))


@pytest.mark.parametrize("length, chunk, size", LAYOUTS)
def test_the_slices_of_the_ranks_in_order_are_the_chunk(length: int, chunk: int, size: int) -> None:
    layout = SequenceLayout(length, chunk, size)
    slices = [layout.owned_positions(rank).split(layout.local_lengths) for rank in range(size)]
    chunks = [torch.cat(of_all_ranks) for of_all_ranks in zip(*slices, strict=True)]
    assert torch.equal(torch.cat(chunks), torch.arange(length))
    assert tuple(len(tokens) for tokens in chunks) == layout.chunk_lengths


def test_the_last_chunk_may_be_shorter() -> None:
    layout = SequenceLayout(64, 24, 4)
    assert layout.num_chunks == 3
    assert layout.chunk_lengths == (24, 24, 16)
    assert layout.local_lengths == (6, 6, 4)
    assert layout.local_length == 16
    assert layout.owned_spans(1) == [(6, 12), (30, 36), (52, 56)]
    assert layout.owned_positions(1).tolist() == [*range(6, 12), *range(30, 36), *range(52, 56)]


def test_a_chunk_longer_than_the_sequence_is_one_chunk() -> None:
    assert SequenceLayout(12, 64, 4).chunk_lengths == (12,)


@pytest.mark.parametrize(
    "length, chunk, message",
    [
        (10, 4, r"the sequence length \(10\) must be a positive multiple .* size \(4\); use 8 or 12"),
        (16, 6, r"the chunk length \(6\) must be a positive multiple .* size \(4\); use 4 or 8"),
        (2, 4, r"the sequence length \(2\) must be a positive multiple .* size \(4\); use 4 or 4"),
    ],
)
def test_lengths_that_the_ranks_cannot_share_are_refused(length: int, chunk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceLayout(length, chunk, 4)
