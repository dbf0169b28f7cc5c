"""A run that stopped and resumed is the run that never stopped, bit for bit: losses, weights, moments, random numbers.

It resumes from the file of settings in its checkpoint.

Hidden dropout is on, so a random state that is not restored shows.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.integration.runs import OFFLOADED, PLAIN, Run, base_flags, ranks, read_tensors, train

SETTINGS = ["--train-iters", "8", "--hidden-dropout", "0.1", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2"]
HALF, WHOLE = "global_step4", "global_step8"


@dataclass(frozen=True)
class Layout:
    """How a run is spread and executed."""

    num_ranks: int
    sequence_parallel: int
    zero_stage: int
    execution: list[str]
    deterministic: bool = False

    def __str__(self) -> str:
        execution = "fpdt" if self.execution else "plain"
        name = f"{self.num_ranks}ranks-sp{self.sequence_parallel}-zero{self.zero_stage}-{execution}"
        return f"{name}-deterministic" if self.deterministic else name

    @property
    def flags(self) -> list[str]:
        mode = ["--deterministic-mode"] if self.deterministic else []
        return [*self.execution, *mode, *ranks(self.sequence_parallel, self.zero_stage)]


QUICK = [Layout(1, 1, 0, PLAIN), Layout(2, 2, 3, OFFLOADED), Layout(2, 1, 1, PLAIN, deterministic=True)]
SLOW = [
    *(Layout(2, size, stage, how, deterministic=True) for size, stage, how in [(2, 1, OFFLOADED), (2, 3, PLAIN)]),
    Layout(2, 2, 3, OFFLOADED, deterministic=True),
    Layout(1, 1, 3, PLAIN),
    Layout(2, 2, 0, OFFLOADED),
    Layout(2, 1, 1, PLAIN),
    Layout(2, 2, 1, OFFLOADED),
    Layout(2, 2, 2, OFFLOADED),
    Layout(2, 1, 2, PLAIN),
    Layout(4, 2, 3, OFFLOADED),
]


@pytest.mark.parametrize("layout", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=str)
def test_a_resumed_run_is_bit_identical_to_a_straight_one(corpus: Path, tmp_path: Path, layout: Layout) -> None:
    flags = [*base_flags(corpus), *SETTINGS, *layout.flags]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"

    def run(name: str, *extra: str) -> Run:
        return train([*flags, *extra], tmp_path / name, layout.num_ranks)

    whole = run("whole_events", "--save", str(straight))
    first = run("first_events", "--save", str(resumed), "--exit-interval", "4")
    settings = ["--config", str(resumed / HALF / "run.yaml"), "--load", str(resumed)]
    second = train(settings, tmp_path / "second_events", layout.num_ranks)

    assert list(first.losses) == [1, 2, 3, 4]
    assert list(second.losses) == [5, 6, 7, 8]
    assert first.losses | second.losses == whole.losses
    assert first.grad_norms | second.grad_norms == whole.grad_norms
    assert_same_checkpoint(straight / WHOLE, resumed / WHOLE, layout.num_ranks)
    assert_dropout_drew_random_numbers(resumed)


def assert_same_checkpoint(first: Path, second: Path, num_ranks: int) -> None:
    ours, theirs = read_tensors(first), read_tensors(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    random_states = {f"random_{rank}.pt" for rank in range(num_ranks)}
    assert random_states <= {path.name for path in first.iterdir()}
    assert json.loads((first / "train_state.json").read_text()) == json.loads((second / "train_state.json").read_text())


def assert_dropout_drew_random_numbers(folder: Path) -> None:
    half, whole = (torch.load(folder / step / "random_0.pt") for step in (HALF, WHOLE))
    assert not torch.equal(half["cpu"], whole["cpu"])
