"""Which checkpoints a run can load, and what it answers to the others."""

from pathlib import Path

import pytest

from megatron.checkpointing import CheckpointError, check_checkpoint
from tests.unit.checkpointing.pretend import PADDED_VOCAB_SIZE, STATE, config, save

pytestmark = pytest.mark.usefixtures("only_rank")


@pytest.mark.parametrize(
    "flags",
    [
        ["--hidden-dropout", "0.1"],
        ["--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-size", "4"],
        ["--seq-length", "64", "--max-position-embeddings", "128"],
    ],
    ids=["dropout", "fpdt", "shorter sequences"],
)
def test_how_a_model_is_run_does_not_matter_to_its_checkpoint(tmp_path: Path, flags: list[str]) -> None:
    check_checkpoint(save(tmp_path), config(*flags), 1, PADDED_VOCAB_SIZE)


def test_a_checkpoint_of_another_model_is_refused_by_the_flags_that_differ(tmp_path: Path) -> None:
    path = save(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(path, config("--num-layers", "3", "--swiglu"), 1, PADDED_VOCAB_SIZE)
    assert "--num-layers is 2 in the checkpoint and 3 in the flags" in str(caught.value)
    assert "--swiglu is False in the checkpoint and True in the flags" in str(caught.value)
    assert str(path / "config.json") in str(caught.value)


ROPE = ["--use-rotary-position-embeddings"]
SCALED = [*ROPE, "--rotary-position-embeddings-theta", "5e6", "--rope-scaling-type", "linear"]
SCALED += ["--rope-scaling-factor", "4"]


def test_another_rope_is_refused_unless_it_is_to_be_changed(tmp_path: Path) -> None:
    path = save(tmp_path, STATE, *ROPE)
    with pytest.raises(CheckpointError, match=r"theta is 10000.0 .* 5000000.0 .*; add --change-rope to continue"):
        check_checkpoint(path, config(*SCALED, "--finetune"), 1, PADDED_VOCAB_SIZE)
    check_checkpoint(path, config(*SCALED, "--change-rope"), 1, PADDED_VOCAB_SIZE)
    check_checkpoint(path, config(*ROPE, "--change-rope"), 1, PADDED_VOCAB_SIZE)


@pytest.mark.parametrize("change", [[], ["--change-rope"]])
def test_changing_rope_excuses_no_other_difference(tmp_path: Path, change: list[str]) -> None:
    path = save(tmp_path, STATE, *ROPE)
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
        (["--zero-stage", "3"], 1, "--zero-stage 0, fp32, and this run has 1 ranks, --zero-stage 3"),
    ],
)
def test_other_partitions_of_the_optimizer_states_are_refused_unless_asked_for(
    tmp_path: Path, flags: list[str], num_ranks: int, expected: str
) -> None:
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        check_checkpoint(path, config(*flags), num_ranks, PADDED_VOCAB_SIZE)


@pytest.mark.parametrize("flags", [["--finetune"], ["--no-load-optim"], ["--finetune", "--zero-stage", "3", "--bf16"]])
def test_weights_alone_load_in_any_layout(tmp_path: Path, flags: list[str]) -> None:
    check_checkpoint(save(tmp_path), config(*flags), 4, PADDED_VOCAB_SIZE)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"has 128 rows in its embedding, .* ask for 256; use the tokenizer"):
        check_checkpoint(path, config(), 1, 2 * PADDED_VOCAB_SIZE)
