"""What surrounds DeepSpeed's files in a checkpoint: the pointer to the newest one, counters, random state, checks."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.arguments import parse_args
from megatron.checkpointing import (
    CheckpointError,
    check_checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron.config import Config
from megatron.core.parallel_state import ParallelState
from megatron.initialize import Context
from megatron.train_state import TrainState

PADDED_VOCAB_SIZE = 128
MODEL = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "8", "--seq-length", "128"]
STATE = TrainState(iteration=7, consumed_samples=28, consumed_tokens=3584, data_samples=28, seq_length=128)


class PretendEngine:
    """Writes an empty checkpoint and remembers what it was told to load."""

    def __init__(self) -> None:
        self.loads: list[tuple[Path, str, bool]] = []

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir(parents=True)

    def load(self, folder: Path, tag: str, with_optimizer: bool) -> None:
        self.loads.append((folder, tag, with_optimizer))


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """Be the only rank of a gloo world."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield Context(ParallelState(), torch.device("cpu"), torch.float32, logging.getLogger("megatron"), 0)
    dist.destroy_process_group()


def config(*flags: str) -> Config:
    return parse_args([*MODEL, "--lr", "1e-4", *flags])


def save(context: Context, folder: Path, state: TrainState = STATE, *flags: str) -> Path:
    engine: Any = PretendEngine()
    return save_checkpoint(engine, context, config("--save", str(folder), *flags), state, PADDED_VOCAB_SIZE)


def load(context: Context, path: Path, *flags: str) -> tuple[TrainState, PretendEngine]:
    engine: Any = PretendEngine()
    return load_checkpoint(path, engine, context, config("--load", str(path.parent), *flags)), engine


def test_a_folder_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(None) is None
    assert find_checkpoint(str(tmp_path / "absent")) is None
    assert find_checkpoint(str(tmp_path)) is None


def test_the_checkpoint_that_was_saved_last_is_found(context: Context, tmp_path: Path) -> None:
    save(context, tmp_path)
    later = TrainState(iteration=9)
    save(context, tmp_path, later)
    assert find_checkpoint(str(tmp_path)) == tmp_path / "global_step9"
    assert (tmp_path / "latest").read_text() == "global_step9"


def test_a_checkpoint_that_is_not_whole_is_refused(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path)
    (path / "train_state.json").unlink()
    with pytest.raises(CheckpointError, match="names the checkpoint 'global_step7', which is not there or not whole"):
        find_checkpoint(str(tmp_path))


def test_no_temporary_file_is_left(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path / "saved")
    assert {each.name for each in path.iterdir()} == {"config.json", "layout.json", "random_0.pt", "train_state.json"}
    assert {each.name for each in path.parent.iterdir()} == {"latest", "global_step7"}


def test_loading_restores_the_counters_the_random_state_and_the_optimizer(context: Context, tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = save(context, tmp_path)
    expected = torch.rand(3)
    torch.manual_seed(6)
    state, engine = load(context, path)
    assert state == STATE
    assert torch.equal(torch.rand(3), expected)
    assert engine.loads == [(tmp_path, "global_step7", True)]


def test_finetuning_takes_the_weights_alone(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path)
    before = torch.get_rng_state()
    state, engine = load(context, path, "--finetune")
    assert state == TrainState()
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.loads == [(tmp_path, "global_step7", False)]


def test_optimizer_and_random_state_can_each_be_left_out(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    state, engine = load(context, path, "--no-load-optim", "--no-load-rng")
    assert state == STATE
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.loads == [(tmp_path, "global_step7", False)]


def test_a_rank_that_the_saving_run_did_not_have_is_told_so(
    context: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context.log, "propagate", True)
    path = save(context, tmp_path)
    (path / "random_0.pt").unlink()
    load(context, path)
    assert "this rank's dropout starts from its seed" in caplog.text


def test_counters_that_cannot_be_read_are_a_clear_error(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path)
    (path / "train_state.json").write_text('{"iteration": ')
    with pytest.raises(CheckpointError, match=r"train_state.json cannot be read .*; point --load at a whole"):
        load(context, path)


def test_the_configuration_that_wrote_a_checkpoint_is_kept(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path, STATE, "--swiglu")
    assert Config.from_dict(json.loads((path / "config.json").read_text())).model.swiglu


@pytest.mark.parametrize(
    "flags",
    [
        ["--hidden-dropout", "0.1"],
        ["--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-size", "4"],
        ["--seq-length", "64", "--max-position-embeddings", "128"],
    ],
    ids=["dropout", "fpdt", "shorter sequences"],
)
def test_how_a_model_is_run_does_not_matter_to_its_checkpoint(
    context: Context, tmp_path: Path, flags: list[str]
) -> None:
    check_checkpoint(save(context, tmp_path), config(*flags), 1, PADDED_VOCAB_SIZE)


def test_a_checkpoint_of_another_model_is_refused_by_the_flags_that_differ(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(path, config("--num-layers", "3", "--swiglu"), 1, PADDED_VOCAB_SIZE)
    assert "--num-layers is 2 in the checkpoint and 3 in the flags" in str(caught.value)
    assert "--swiglu is False in the checkpoint and True in the flags" in str(caught.value)
    assert str(path / "config.json") in str(caught.value)


ROPE = ["--use-rotary-position-embeddings"]
SCALED = [*ROPE, "--rotary-position-embeddings-theta", "5e6", "--rope-scaling-type", "linear"]
SCALED += ["--rope-scaling-factor", "4"]


def test_another_rope_is_refused_unless_it_is_to_be_changed(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path, STATE, *ROPE)
    with pytest.raises(CheckpointError, match=r"theta is 10000.0 .* 5000000.0 .*; add --change-rope to train it on"):
        check_checkpoint(path, config(*SCALED, "--finetune"), 1, PADDED_VOCAB_SIZE)
    check_checkpoint(path, config(*SCALED, "--change-rope"), 1, PADDED_VOCAB_SIZE)
    check_checkpoint(path, config(*ROPE, "--change-rope"), 1, PADDED_VOCAB_SIZE)


@pytest.mark.parametrize("change", [[], ["--change-rope"]])
def test_changing_rope_excuses_no_other_difference(context: Context, tmp_path: Path, change: list[str]) -> None:
    path = save(context, tmp_path, STATE, *ROPE)
    with pytest.raises(CheckpointError, match=r"--swiglu is False .*; pass the flags it was trained with"):
        check_checkpoint(path, config(*SCALED, *change, "--swiglu"), 1, PADDED_VOCAB_SIZE)
    with pytest.raises(CheckpointError, match=r"--use-rotary-position-embeddings is True"):
        check_checkpoint(path, config(*change), 1, PADDED_VOCAB_SIZE)


@pytest.mark.parametrize(
    ("flags", "num_ranks", "expected"),
    [
        ([], 2, "written with 1 ranks, --zero-stage 0, fp32, and this run has 2 ranks"),
        (["--zero-stage", "2"], 1, "--zero-stage 0, fp32, and this run has 1 ranks, --zero-stage 2, fp32"),
        (["--bf16"], 1, "--zero-stage 0, fp32, and this run has 1 ranks, --zero-stage 1, --bf16"),
        (["--zero-stage", "3", "--finetune"], 1, "--zero-stage 0, fp32, and this run has 1 ranks, --zero-stage 3"),
    ],
)
def test_partitions_that_deepspeed_cannot_read_are_refused(
    context: Context, tmp_path: Path, flags: list[str], num_ranks: int, expected: str
) -> None:
    path = save(context, tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        check_checkpoint(path, config(*flags), num_ranks, PADDED_VOCAB_SIZE)


@pytest.mark.parametrize("flags", [["--finetune"], ["--no-load-optim"], ["--finetune", "--zero-stage", "2"]])
def test_weights_alone_load_on_any_number_of_ranks(context: Context, tmp_path: Path, flags: list[str]) -> None:
    check_checkpoint(save(context, tmp_path), config(*flags), 4, PADDED_VOCAB_SIZE)


def test_another_vocabulary_is_refused(context: Context, tmp_path: Path) -> None:
    path = save(context, tmp_path)
    with pytest.raises(CheckpointError, match=r"has 128 rows in its embedding, .* ask for 256; use the tokenizer"):
        check_checkpoint(path, config(), 1, 2 * PADDED_VOCAB_SIZE)
