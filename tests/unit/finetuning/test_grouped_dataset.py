"""Batches of one length each: every conversation once per epoch, and an order that follows from the seed alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron.config import Config
from megatron.data.batch import Sample
from megatron.finetuning.grouped_dataset import bucket_lengths
from megatron.finetuning.packed_dataset import SampleSequence, build_packed_datasets
from megatron.tokenizer.null import NullTokenizer
from tests.unit.config.commands import parsed
from tests.unit.finetuning.test_packed_dataset import write

BATCH = 4


def config_of(path: Path, flags: str = "") -> Config:
    return parsed(f"--seq-length 64 --data-path {path} --split 100,0,0 --group-by-length --vocab-size 10000 {flags}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Conversations of 4 to 64 tokens, the short ones more often; each begins with its number."""
    lengths = 4 + (np.random.default_rng(1).random(90) ** 3 * 61).astype(int)
    lengths[-1] = 65
    return write(tmp_path / "a", [(str(100 + i), " ".join(["1"] * (length - 2))) for i, length in enumerate(lengths)])


def build(path: Path, num_samples: int, flags: str = "") -> SampleSequence:
    train, *_ = build_packed_datasets(config_of(path, flags), NullTokenizer(10000), (num_samples, 0, 0), BATCH)
    assert train is not None
    return train


def conversations_of(sample: Sample) -> list[int]:
    assert sample.documents is not None
    return [int(sample.tokens[start : start + 1][0]) for start, stop in sample.documents if stop > start]


@pytest.mark.parametrize("ranks, lengths", [(1, {1, 2, 4, 8, 16, 32, 64}), (16, {16, 32, 64})])
def test_a_batch_has_one_length_and_an_epoch_every_conversation(path: Path, ranks: int, lengths: set[int]) -> None:
    data = build(path, 400, f"--ds-sequence-parallel-size {ranks}")
    found, seen = Counter[int](), set[int]()
    for first in range(0, 400, BATCH):
        samples = [data[first + k] for k in range(BATCH)]
        (length,) = {len(sample.tokens) - 1 for sample in samples}
        seen.add(length)
        found.update(number for sample in samples for number in conversations_of(sample))
    assert {16, 32, 64} <= seen <= lengths
    assert len(found) == 90
    assert max(found.values()) - min(found.values()) <= 1


def test_the_order_follows_from_the_seed_and_not_from_the_number_of_samples(path: Path) -> None:
    few, many = build(path, 20), build(path, 200)
    other = build(path, 20, "--seed 2")
    orders = [[conversations_of(data[i]) for i in range(20)] for data in (few, many, other)]
    assert orders[0] == orders[1] != orders[2]
    assert [conversations_of(many[i]) for i in (150, 3)] == [conversations_of(build(path, 200)[i]) for i in (150, 3)]


def test_a_conversation_is_in_the_shortest_sequence_that_holds_it_or_fills_a_longer_batch(path: Path) -> None:
    data, padding, total = build(path, 80), 0, 0
    for sample in (data[i] for i in range(80)):
        assert sample.documents is not None
        total += len(sample.tokens) - 1
        padding += len(sample.tokens) - 1 - sample.documents[-1][1]
    assert padding / total < 0.5


@pytest.mark.parametrize(
    "longest, ranks, lengths",
    [
        (64, 1, [1, 2, 4, 8, 16, 32, 64]),
        (17, 1, [1, 2, 4, 8, 16, 32]),
        (5, 4, [4, 8]),
        (60, 16, [16, 32, 64]),
    ],
)
def test_lengths_are_halves_that_the_ranks_can_share(longest: int, ranks: int, lengths: list[int]) -> None:
    assert bucket_lengths(64, longest, ranks) == lengths
