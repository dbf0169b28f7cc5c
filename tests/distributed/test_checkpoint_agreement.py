"""Ranks that save and load agree: one rank's error is every rank's, and all choose the same checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.checkpointing import CheckpointError, Saver, choose_checkpoint, starting_state
from megatron.checkpointing.agreement import on_all_ranks, on_first_rank
from megatron.checkpointing.train_state import TrainState
from megatron.core.parallel_state import ParallelState
from megatron.initialize import Context
from tests.distributed.rank_pool import RankPool
from tests.unit.checkpointing.pretend import CONTEXT, PADDED_VOCAB_SIZE, config, flip_a_byte


class OneFileEach:
    """An engine of which every rank writes a file, and one may fail."""

    def __init__(self, failing_rank: int | None = None) -> None:
        self._failing_rank = failing_rank

    def save(self, folder: Path, tag: str, with_frozen: bool = True) -> list[Path]:
        path = folder / tag / f"shard_{dist.get_rank()}.pt"
        path.write_bytes(bytes(1000))
        if dist.get_rank() == self._failing_rank:
            raise OSError(28, "No space left on device")
        return [path]


def _context() -> Context:
    return replace(CONTEXT, parallel_state=ParallelState(rank=dist.get_rank(), world_size=dist.get_world_size()))


def _fail_on(failing_rank: int) -> str:
    def work() -> int:
        if dist.get_rank() == failing_rank:
            raise ValueError("a rank has had enough")
        return dist.get_rank()

    try:
        return str(on_all_ranks(work))
    except CheckpointError as error:
        return str(error)


def _first_rank_alone() -> int:
    return on_first_rank(lambda: 10 + dist.get_rank())


def _save(folder: Path, iteration: int, failing_rank: int | None = None) -> str:
    engine: Any = OneFileEach(failing_rank)
    saver = Saver(engine, _context(), config("--save", str(folder)), PADDED_VOCAB_SIZE)
    try:
        return saver.save(folder, TrainState(iteration=iteration)).name
    except CheckpointError as error:
        return str(error)


def _choose(folder: Path) -> str:
    chosen = choose_checkpoint(config("--load", str(folder)).checkpoint, _context())
    return chosen.name if chosen else "none"


def _starting_iteration(folder: Path) -> int:
    """From a folder of which every rank has its own."""
    path = folder / str(dist.get_rank()) / "global_step2"
    return starting_state(path, config("--global-batch-size", "6"), _context()).iteration


def test_every_rank_has_all_results_or_the_same_error(ranks: RankPool) -> None:
    assert ranks.run(_fail_on, 9, num_ranks=3) == ["[0, 1, 2]"] * 3
    assert ranks.run(_fail_on, 1, num_ranks=3) == ["ValueError: a rank has had enough"] * 3
    assert ranks.run(_first_rank_alone, num_ranks=2) == [10, 10]


@pytest.mark.parametrize("failing_rank", [0, 2])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(
    ranks: RankPool, tmp_path: Path, failing_rank: int
) -> None:
    assert ranks.run(_save, tmp_path, 2, num_ranks=3) == ["global_step2"] * 3
    errors = ranks.run(_save, tmp_path, 4, failing_rank, num_ranks=3)
    assert len(set(errors)) == 1
    assert "global_step4 cannot be saved: No space left on device" in errors[0]
    assert {path.name for path in tmp_path.iterdir()} == {"global_step2", "latest"}


@pytest.mark.parametrize("damaged", ["shard_0.pt", "shard_2.pt", "random_1.pt"])
def test_all_ranks_pass_over_what_one_of_them_finds_damaged(ranks: RankPool, tmp_path: Path, damaged: str) -> None:
    for iteration in (2, 4):
        ranks.run(_save, tmp_path, iteration, num_ranks=3)
    assert ranks.run(_choose, tmp_path, num_ranks=3) == ["global_step4"] * 3
    flip_a_byte(tmp_path / "global_step4" / damaged)
    assert ranks.run(_choose, tmp_path, num_ranks=3) == ["global_step2"] * 3
    assert ranks.run(_choose, tmp_path, num_ranks=2) == ["global_step2"] * 2
    shutil.rmtree(tmp_path / "global_step4")
    assert ranks.run(_choose, tmp_path, num_ranks=3) == ["global_step2"] * 3


def test_all_ranks_start_with_the_counters_that_rank_0_read(ranks: RankPool, tmp_path: Path) -> None:
    for rank in range(3):
        path = tmp_path / str(rank) / "global_step2"
        path.mkdir(parents=True)
        (path / "train_state.json").write_text(json.dumps(TrainState(iteration=2 + rank).to_dict()))
        (path / "config.json").write_text(json.dumps(config().to_dict()))
    assert ranks.run(_starting_iteration, tmp_path, num_ranks=3) == [2] * 3
