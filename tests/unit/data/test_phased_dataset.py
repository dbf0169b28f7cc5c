"""Samples of a schedule of lengths: every token once per epoch across the phases, in an order that does not depend on
how many samples are asked for."""

from collections.abc import Sequence

import numpy as np
import pytest

from megatron.data.blended_dataset import SampleDataset
from megatron.data.gpt_dataset import SampleSettings, build_dataset
from tests.unit.data.conftest import MakeDataset

SIZES = [5, 0, 17, 3, 8, 1, 30, 11, 2, 23]  # 100 tokens, whose ids count upwards
PHASES = ((0, 4), (6, 8), (10, 16))


def build(paths: Sequence[str], num_samples: int, seed: int = 1) -> SampleDataset:
    data = build_dataset(paths, "train", num_samples, SampleSettings(16, seed, phases=PHASES))
    assert data is not None
    return data


def labels(data: SampleDataset, samples: range) -> list[int]:
    return [token for sample in samples for token in data[sample][1:].tolist()]


def test_every_token_is_a_label_once_before_any_is_again(make_dataset: MakeDataset) -> None:
    data = build([make_dataset(SIZES)], 12)
    assert [len(data[i]) - 1 for i in range(12)] == [4] * 6 + [8] * 4 + [16] * 2
    read = labels(data, range(12))  # 24 + 32 + 32 of the 99 tokens that another precedes
    assert len(set(read)) == len(read) == 88


def test_phases_read_on_across_the_end_of_an_epoch(make_dataset: MakeDataset) -> None:
    """The first 32 labels of the second epoch are in the same documents as those of the first, in another order."""
    prefix = make_dataset([7] * 4)  # 28 tokens: the second phase begins in the first epoch, the third in the third
    whole = build_dataset([prefix], "train", 30, SampleSettings(4, 1))
    assert whole is not None
    stream = np.concatenate([sorted_by_start(whole, prefix, 30)])
    data = build([prefix], 11)
    for first, last, start, length in ((0, 6, 0, 4), (6, 10, 24, 8), (10, 11, 56, 16)):
        expected = {tuple(stream[start + k * length : start + (k + 1) * length + 1]) for k in range(last - first)}
        assert {tuple(data[i][:].tolist()) for i in range(first, last)} == expected


def sorted_by_start(data: SampleDataset, prefix: str, num_samples: int) -> np.ndarray:
    """Return the tokens that the samples cover, in the order of the documents."""
    rows = np.argsort(data._order.shuffle_index[:num_samples])  # type: ignore[attr-defined]
    pieces = [data[int(row)][:-1] for row in rows]
    return np.concatenate([*pieces, data[int(rows[-1])][-1:]])


@pytest.mark.parametrize("num_sources", [1, 2])
def test_more_samples_only_append(make_dataset: MakeDataset, num_sources: int) -> None:
    prefixes = [make_dataset(SIZES, f"data{k}") for k in range(num_sources)]
    paths = prefixes if num_sources == 1 else ["3", prefixes[0], "1", prefixes[1]]
    few, many = build(paths, 7), build(paths, 40)
    assert (len(few), len(many)) == (10, 40)  # a phase is built whole, as its samples are shuffled together
    for sample in range(7):
        np.testing.assert_array_equal(few[sample][:], many[sample][:])
    orders = [[data[sample][:].tolist() for sample in range(10)] for data in (many, build(paths, 40, seed=2))]
    assert orders[0] != orders[1]


def test_each_source_of_a_blend_reads_on_by_itself(make_dataset: MakeDataset) -> None:
    prefixes = [make_dataset([50] * 4, "first"), make_dataset([50] * 4, "second")]
    data = build(["1", prefixes[0], "1", prefixes[1]], 16)
    read = labels(data, range(16))
    assert len(read) == 24 + 32 + 96
    assert max(np.bincount(read)) <= 2  # once per source, as both hold the same ids


def test_a_phase_that_is_not_reached_is_not_built(make_dataset: MakeDataset) -> None:
    data = build([make_dataset(SIZES)], 6)
    assert len(data) == 6
    with pytest.raises(IndexError):
        data[6]
