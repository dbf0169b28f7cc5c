"""What is read of a checkpoint."""

from pathlib import Path

import pytest
import torch

from megatron.checkpointing import CheckpointError
from megatron.train_state import TrainState
from tests.unit.checkpointing.pretend import CONTEXT, STATE, load, save

pytestmark = pytest.mark.usefixtures("only_rank")


def test_loading_restores_the_counters_the_random_state_and_the_optimizer(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = save(tmp_path)
    expected = torch.rand(3)
    torch.manual_seed(6)
    state, engine = load(path)
    assert state == STATE
    assert torch.equal(torch.rand(3), expected)
    assert engine.loads == [(tmp_path, "global_step7", True)]


def test_finetuning_takes_the_weights_alone(tmp_path: Path) -> None:
    path = save(tmp_path)
    before = torch.get_rng_state()
    state, engine = load(path, "--finetune")
    assert state == TrainState()
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.loads == [(tmp_path, "global_step7", False)]


def test_optimizer_and_random_state_can_each_be_left_out(tmp_path: Path) -> None:
    path = save(tmp_path)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    state, engine = load(path, "--no-load-optim", "--no-load-rng")
    assert state == STATE
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.loads == [(tmp_path, "global_step7", False)]


def test_a_rank_that_the_saving_run_did_not_have_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONTEXT.log, "propagate", True)
    path = save(tmp_path)
    (path / "random_0.pt").unlink()
    load(path)
    assert "this rank's dropout starts from its seed" in caplog.text


@pytest.mark.parametrize("name", ["train_state.json", "random_0.pt"])
def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path, name: str) -> None:
    path = save(tmp_path)
    (path / name).write_text('{"iteration": ')
    with pytest.raises(CheckpointError, match=r"cannot be (read|loaded).*; .*point --load"):
        load(path)
