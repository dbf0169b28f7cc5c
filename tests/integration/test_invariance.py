"""The same data and seed give the same numbers, however the work is spread, cut and executed.

Losses, gradient norms and validation losses of 20 steps are compared with the golden files. The global batch is the
same everywhere, so fewer data-parallel ranks accumulate more.

Tolerances are relative. What differs between the runs is the order of fp32 sums, which over 20 steps comes to 3e-7 at
most on one processor; the tolerances leave room for another one, whose kernels sum in an order of their own. Gradients
half as large as they should be halve the norm and move the losses by 5e-4.
"""

import itertools
from pathlib import Path

import pytest

from tests.integration.golden_losses import Golden, golden_run
from tests.integration.runs import EXECUTIONS, MODELS, ranks

LOSS_TOLERANCE = 5e-6
GRAD_NORM_TOLERANCE = 5e-5

WORLDS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]  # data parallel, sequence parallel
GRID = list(itertools.product(MODELS, WORLDS, range(4), EXECUTIONS))
SUBSET = [
    ("llama", (1, 1), 0, "plain"),
    ("llama", (1, 1), 3, "fpdt"),
    ("llama", (2, 2), 3, "offloaded"),
    ("gpt", (1, 2), 3, "offloaded"),
    ("gpt", (1, 2), 0, "plain"),
    ("gpt", (2, 1), 1, "fpdt"),
    ("llama", (1, 4), 2, "fpdt"),
    ("llama", (2, 2), 3, "recomputed"),
    ("gpt", (2, 1), 3, "rebuilt"),
    ("gpt", (1, 2), 3, "kept"),
]


def assert_golden(run: Golden, model: str) -> None:
    golden = Golden.read(model)
    assert run.losses == pytest.approx(golden.losses, rel=LOSS_TOLERANCE)
    assert run.validation_losses == pytest.approx(golden.validation_losses, rel=LOSS_TOLERANCE)
    assert run.grad_norms == pytest.approx(golden.grad_norms, rel=GRAD_NORM_TOLERANCE)


def train_and_compare(
    corpus: Path, folder: Path, model: str, world: tuple[int, int], zero_stage: int, execution: str
) -> None:
    data_parallel, sequence_parallel = world
    flags = [*EXECUTIONS[execution], *ranks(sequence_parallel, zero_stage)]
    run = golden_run(model, corpus, folder / "events", flags, data_parallel * sequence_parallel)
    assert_golden(run, model)


@pytest.mark.parametrize("model, world, zero_stage, execution", SUBSET)
def test_a_subset_of_all_layouts_arrives_at_the_golden_losses(
    corpus: Path, tmp_path: Path, model: str, world: tuple[int, int], zero_stage: int, execution: str
) -> None:
    train_and_compare(corpus, tmp_path, model, world, zero_stage, execution)


@pytest.mark.slow
def test_more_ranks_than_heads_arrive_at_the_golden_losses(corpus: Path, tmp_path: Path) -> None:
    train_and_compare(corpus, tmp_path, "llama", (1, 8), 3, "offloaded")


@pytest.mark.grid
@pytest.mark.parametrize("model, world, zero_stage, execution", GRID)
def test_every_layout_arrives_at_the_golden_losses(
    corpus: Path, tmp_path: Path, model: str, world: tuple[int, int], zero_stage: int, execution: str
) -> None:
    train_and_compare(corpus, tmp_path, model, world, zero_stage, execution)


def test_larger_micro_batches_arrive_at_the_golden_losses_of_accumulation(corpus: Path, tmp_path: Path) -> None:
    flags = [*EXECUTIONS["offloaded"], *ranks(2, 2), "--micro-batch-size", "4"]
    assert_golden(golden_run("llama", corpus, tmp_path / "events", flags, num_ranks=2), "llama")
