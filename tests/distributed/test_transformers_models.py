"""Under DeepSpeed, a transformers model trains as transformers trains it in one process.

Continuous integration runs some combinations. The whole grid takes about fifteen minutes:

    pytest -m grid tests/distributed/test_transformers_models.py
"""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from tests.distributed.rank_pool import RankPool
from tests.distributed.transformers_case import (
    LENGTH,
    NUM_STEPS,
    Case,
    Trained,
    train,
    train_and_resume,
    transformers_alone,
)

CASES = [
    Case("llama-tied", zero_stage=3, offloading=True),
    Case("llama-tied", zero_stage=1, sequence_parallel_size=2),
    Case("qwen3_moe", zero_stage=3, sequence_parallel_size=2, balance=1.0, recomputed=3),
    Case("gpt2", zero_stage=3, fpdt=False, sequence_parallel_size=2),
    Case("gpt_oss", zero_stage=3, sequence_parallel_size=2, offloading=True),
    Case("deepseek_v3", zero_stage=1, offloading=True),
    Case("deepseek_v3", zero_stage=3, sequence_parallel_size=2),
    Case("gpt_neox", zero_stage=0),
    Case("gpt_neox", zero_stage=1, sequence_parallel_size=2, offloading=True),
    Case("gemma3_text", zero_stage=1, sequence_parallel_size=2, offloading=True),
    Case("gemma3_text", zero_stage=3),
]
WITH_FOUR = [
    Case("llama-tied", zero_stage=3, num_ranks=4, sequence_parallel_size=4, offloading=True),
    Case("qwen3_moe", zero_stage=3, num_ranks=4, sequence_parallel_size=2),
    Case("gpt_oss", zero_stage=1, num_ranks=4, sequence_parallel_size=4),
    Case("mixtral", zero_stage=3, num_ranks=4, sequence_parallel_size=2, balance=1.0),
    Case("mixtral", zero_stage=1, num_ranks=4, offloading=True, balance=1.0),
]
# A checkpoint of one case is resumed by the other; the first cases have checkpoints.
NUM_SAVED = 3
RESUMED = [(CASES[0], CASES[1]), (CASES[1], CASES[0]), (CASES[2], CASES[2])]

GRID = ("llama-tied", "qwen3_moe", "gpt_oss", "gemma3_text", "deepseek_v3")
DOCUMENTS = (7, 18, 1, 14)


@cache
def alone(family: str, num_samples: int, balance: float, documents: tuple[int, ...]) -> Trained:
    return transformers_alone(Case(family, zero_stage=0, num_ranks=num_samples, balance=balance, documents=documents))


def assert_same(got: Trained, case: Case, first: int = 0) -> None:
    want = alone(case.family, case.num_samples, case.balance, case.documents)
    assert got.losses == pytest.approx(want.losses[first:], rel=1e-5)
    assert got.norms == pytest.approx(want.norms[first:], rel=1e-4)
    assert got.evaluated == pytest.approx(want.evaluated, rel=1e-5)
    assert got.weights.keys() == want.weights.keys()
    for name, weight in want.weights.items():
        torch.testing.assert_close(got.weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


Results = tuple[list[Trained], list[Trained]]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The trained cases, and those that resume some of them."""
    folder = tmp_path_factory.mktemp("transformers")
    resumed = [
        (folder / str(saved), replace(other, sequence_parallel_size=saved.sequence_parallel_size))
        for saved, other in RESUMED
    ]
    with RankPool() as pool:
        arguments = CASES[:NUM_SAVED], CASES[NUM_SAVED:], resumed, folder
        return pool.run(train_and_resume, *arguments, num_ranks=2, timeout_seconds=300)[0]


@pytest.fixture(scope="module")
def trained(on_two: Results) -> dict[Case, Trained]:
    with RankPool() as pool:
        on_four = pool.run(train, WITH_FOUR, None, num_ranks=4, timeout_seconds=300)[0]
    return dict(zip(CASES + WITH_FOUR, on_two[0] + on_four, strict=True))


@pytest.mark.parametrize("case", CASES + WITH_FOUR, ids=str)
def test_training_is_that_of_transformers(trained: dict[Case, Trained], case: Case) -> None:
    assert_same(trained[case], case)


def test_a_checkpoint_is_resumed_at_any_stage(on_two: Results) -> None:
    for (saved, other), result in zip(RESUMED, on_two[1], strict=True):
        case = replace(other, sequence_parallel_size=saved.sequence_parallel_size)
        assert_same(result, case, first=NUM_STEPS // 2)


@pytest.mark.grid
@pytest.mark.parametrize("family", GRID)
def test_every_combination_trains_as_transformers(family: str) -> None:
    """Sequence parallelism, ZeRO, offloading, chunks with and without a shorter last one, and documents."""
    how = product((1, 2, 4), (1, 3), (False, True), (16, 20), ((LENGTH,), DOCUMENTS))
    cases = [
        Case(family, zero, 4, size, offloading, chunk_size=chunk, documents=documents)
        for size, zero, offloading, chunk, documents in how
    ]
    with RankPool() as pool:
        results = pool.run(train, cases, None, num_ranks=4, timeout_seconds=1500)[0]
    for case, result in zip(cases, results, strict=True):
        assert_same(result, case)
