from itertools import pairwise

import pytest

from megatron.data.errors import DataError
from megatron.data.splits import parse_data_paths, parse_split, split_documents


@pytest.mark.parametrize(
    "split, shares",
    [
        ("969,30,1", (0.969, 0.03, 0.001)),
        ("969, 30, 1", (0.969, 0.03, 0.001)),
        ("90/10", (0.9, 0.1, 0)),
        ("1", (1, 0, 0)),
        ("0,0,5", (0, 0, 1)),
    ],
)
def test_shares_are_scaled_to_sum_to_one(split: str, shares: tuple[float, ...]) -> None:
    assert parse_split(split) == pytest.approx(shares)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan,1", "inf", "1,,2"])
def test_a_senseless_split_is_refused(split: str) -> None:
    with pytest.raises(DataError, match=r"--split \(.*\) must be one to three shares"):
        parse_split(split)


@pytest.mark.parametrize("num_documents", [0, 1, 2, 3, 10, 671, 10**12])
@pytest.mark.parametrize("split", ["969,30,1", "0,1,1", "1,1,1", "98,1,1"])
def test_every_document_is_in_one_part(num_documents: int, split: str) -> None:
    parts = split_documents(num_documents, parse_split(split))
    assert (parts[0].start, parts[-1].stop) == (0, num_documents)
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert all(part.start <= part.stop for part in parts)


def test_one_prefix_or_weighted_prefixes_are_read() -> None:
    assert parse_data_paths(["a"]) == (["a"], [1.0])
    assert parse_data_paths(["1", "a", "3", "b"]) == (["a", "b"], [0.25, 0.75])


@pytest.mark.parametrize("paths", [[], ["a", "b"], ["1", "a", "2"], ["a", "1"]])
def test_paths_that_are_not_pairs_are_refused(paths: list[str]) -> None:
    with pytest.raises(DataError, match=r"--data-path \(.*\) must be one prefix, or pairs"):
        parse_data_paths(paths)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_not_positive_is_refused(weight: str) -> None:
    with pytest.raises(DataError, match="has a weight that is not above 0"):
        parse_data_paths(["1", "a", weight, "b"])
