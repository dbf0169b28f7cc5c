"""A run that goes on with other ranks, another sequence-parallel size or another ZeRO stage is the run that did not.

Losses and gradient norms after the change are those of the undisturbed run to fp32 rounding. Weights alone are not
enough for that, which a run with fresh moments shows.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.runs import LLAMA, OFFLOADED, PLAIN, Run, base_flags, ranks, train
from tests.unit.tools.tool import run_tool

CHANGE, END = 3, 6
# 12 samples are whole micro-batches on 1, 2, 3 and 4 ranks.
SETTINGS = ["--train-iters", str(END), "--global-batch-size", "12", "--lr-decay-style", "cosine"]


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    num_ranks: int
    zero_stage: int
    sequence_parallel: int = 1

    def __str__(self) -> str:
        return f"{self.num_ranks}ranks-zero{self.zero_stage}-sp{self.sequence_parallel}"


QUICK = [(Layout(1, 1), Layout(2, 3, sequence_parallel=2)), (Layout(2, 3), Layout(1, 2))]
SLOW = [
    (Layout(1, 1), Layout(2, 1)),
    (Layout(2, 1), Layout(1, 1)),
    (Layout(2, 1), Layout(3, 1)),
    (Layout(2, 3), Layout(4, 3)),
    (Layout(2, 1), Layout(2, 3)),
    (Layout(2, 3), Layout(2, 2)),
    (Layout(2, 1), Layout(2, 1, sequence_parallel=2)),
    (Layout(2, 3), Layout(4, 0, sequence_parallel=2)),
    (Layout(2, 0), Layout(2, 3)),
]


@dataclass(frozen=True)
class Source:
    """A run to its end, and the checkpoint of its middle."""

    run: Run
    checkpoints: Path


class Sources:
    """Runs from the start, one for each layout, made when they are asked for."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self._folder = corpus, folder
        self._sources: dict[Layout, Source] = {}

    def of(self, layout: Layout) -> Source:
        if layout not in self._sources:
            folder = self._folder / str(layout)
            save = ["--save", str(folder / "checkpoints"), "--save-interval", str(CHANGE)]
            run = self.train(layout, folder / "events", *save)
            (folder / "checkpoints" / "latest").write_text(f"global_step{CHANGE}")
            self._sources[layout] = Source(run, folder / "checkpoints")
        return self._sources[layout]

    def train(self, layout: Layout, events: Path, *extra: str) -> Run:
        execution = OFFLOADED if layout.sequence_parallel > 1 else PLAIN
        spread = ranks(layout.sequence_parallel, layout.zero_stage)
        return train(
            [*base_flags(self.corpus, LLAMA), *SETTINGS, *execution, *spread, *extra], events, layout.num_ranks
        )


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(corpus, tmp_path_factory.mktemp("sources"))


def assert_goes_on(run: Run, undisturbed: Run) -> None:
    assert list(run.losses) == list(range(CHANGE + 1, END + 1))
    for iteration in run.losses:
        assert run.losses[iteration] == pytest.approx(undisturbed.losses[iteration], rel=1e-5)
        assert run.grad_norms[iteration] == pytest.approx(undisturbed.grad_norms[iteration], rel=1e-5)


@pytest.mark.parametrize("change", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=str)
def test_a_run_goes_on_in_another_layout(sources: Sources, tmp_path: Path, change: tuple[Layout, Layout]) -> None:
    source = sources.of(change[0])
    load = ["--load", str(source.checkpoints), "--universal-checkpoint"]
    assert_goes_on(sources.train(change[1], tmp_path, *load), source.run)


def test_a_run_goes_on_from_the_universal_form(sources: Sources, tmp_path: Path) -> None:
    source = sources.of(Layout(1, 1))
    assert run_tool("make_universal_checkpoint", source.checkpoints, tmp_path / "universal") == 0
    load = ["--load", str(tmp_path / "universal"), "--universal-checkpoint"]
    assert_goes_on(sources.train(Layout(2, 3), tmp_path / "events", *load), source.run)


def test_shards_that_were_swapped_between_ranks_are_not_gathered(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources.of(Layout(2, 3)).checkpoints / f"global_step{CHANGE}", tmp_path / "swapped")
    first, second = sorted((tmp_path / "swapped").glob("*optim_states.pt"))
    assert first.stat().st_size == second.stat().st_size
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    for tool in ("consolidate_checkpoint", "make_universal_checkpoint"):
        assert run_tool(tool, tmp_path / "swapped", tmp_path / tool) == 2
        assert not (tmp_path / tool).exists()


def test_fresh_moments_are_not_enough(sources: Sources, tmp_path: Path) -> None:
    source = sources.of(Layout(1, 1))
    load = ["--load", str(source.checkpoints), "--universal-checkpoint", "--no-load-optim"]
    run = sources.train(Layout(2, 1), tmp_path, *load)
    assert run.losses[CHANGE + 1] == pytest.approx(source.run.losses[CHANGE + 1], rel=1e-5)
    assert abs(run.losses[END] / source.run.losses[END] - 1) > 1e-4


def test_a_training_starts_with_portable_weights(sources: Sources, tmp_path: Path) -> None:
    source = sources.of(Layout(1, 1))
    assert run_tool("consolidate_checkpoint", source.checkpoints, tmp_path / "weights") == 0
    want = sources.train(Layout(1, 1), tmp_path / "want", "--load", str(source.checkpoints), "--finetune")
    assert list(want.losses) == list(range(1, END + 1))
    same = sources.train(Layout(1, 1), tmp_path / "same", "--load", str(tmp_path / "weights"))
    assert (same.losses, same.grad_norms) == (want.losses, want.grad_norms)
    partitioned = sources.train(Layout(2, 3), tmp_path / "partitioned", "--load", str(tmp_path / "weights"))
    assert partitioned.losses == pytest.approx(want.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_portable_weights_start_bf16_training_as_finetuning_does(sources: Sources, tmp_path: Path, stage: int) -> None:
    layout = Layout(2, stage)
    sources.train(layout, tmp_path / "first", "--save", str(tmp_path / "checkpoints"), "--bf16")
    assert run_tool("consolidate_checkpoint", tmp_path / "checkpoints", tmp_path / "weights") == 0
    load = ["--bf16", "--load", str(tmp_path / "checkpoints"), "--finetune"]
    want = sources.train(layout, tmp_path / "want", *load)
    same = sources.train(layout, tmp_path / "same", "--bf16", "--load", str(tmp_path / "weights"))
    assert (same.losses, same.grad_norms) == (want.losses, want.grad_norms)
