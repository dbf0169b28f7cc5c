"""What is read of a checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from megatron.checkpointing import CheckpointError, saved_state, starting_state
from megatron.checkpointing.train_state import TrainState
from megatron.weights import manifest
from megatron.weights.manifest import seal
from tests.unit.checkpointing.pretend import CONTEXT, STATE, as_deepspeed, choose, config, load, save

pytestmark = pytest.mark.usefixtures("only_rank")


def test_loading_restores_the_counters_the_random_state_and_the_optimizer(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = save(tmp_path)
    expected = torch.rand(3)
    torch.manual_seed(6)
    state, engine = load(path)
    assert state == STATE
    assert torch.equal(torch.rand(3), expected)
    assert engine.loads == [(path, True)]


def test_finetuning_takes_the_weights_alone(tmp_path: Path) -> None:
    path = save(tmp_path)
    before = torch.get_rng_state()
    state, engine = load(path, "--finetune")
    assert state == TrainState()
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.loads == [(path, False)]


def test_optimizer_and_random_state_can_each_be_left_out(tmp_path: Path) -> None:
    path = save(tmp_path)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    state, engine = load(path, "--no-load-optim", "--no-load-rng")
    assert state == STATE
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.loads == [(path, False)]


def test_deepspeed_itself_reads_optimizer_states_on_nvme_and_nothing_else(tmp_path: Path) -> None:
    path = save(tmp_path)
    _, engine = load(path, on_nvme=True)
    assert (engine.loads, engine.loads_by_deepspeed) == ([], [(tmp_path, path.name)])
    for flag in ("--finetune", "--no-load-optim", "--universal-checkpoint"):
        _, engine = load(path, flag, on_nvme=True)
        assert (engine.loads, engine.loads_by_deepspeed) == ([(path, flag == "--universal-checkpoint")], [])


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_a_rank_that_the_saving_run_did_not_have_gets_a_warning_if_it_uses_dropout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, dropout: str
) -> None:
    monkeypatch.setattr(CONTEXT.log, "propagate", True)
    path = save(tmp_path)
    (path / "random_0.pt").unlink()
    load(path, "--attention-dropout", "0", "--hidden-dropout", dropout)
    assert ("this rank's dropout starts from its seed" in caplog.text) == (dropout != "0")


@pytest.mark.parametrize("name", ["train_state.json", "random_0.pt"])
def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path, name: str) -> None:
    path = save(tmp_path)
    (path / name).write_text('{"iteration": ')
    with pytest.raises(CheckpointError, match=r"cannot be (read|loaded).*; .*point --load"):
        load(path)


def test_counters_of_earlier_versions_are_read_and_unknown_ones_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    counters = json.loads((path / "train_state.json").read_text())
    earlier = {name: counters[name] for name in counters if name not in ("global_batch_size", "changes")}
    (path / "train_state.json").write_text(json.dumps(earlier))
    assert saved_state(path, config()) == STATE
    (path / "train_state.json").write_text(json.dumps(counters | {"epochs": 3}))
    with pytest.raises(CheckpointError, match=r"are not those of this version.*'epochs'.*or --finetune"):
        saved_state(path, config())


def test_a_run_starts_with_the_counters_of_rank_0_and_is_warned_of_another_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONTEXT.log, "propagate", True)
    assert starting_state(None, config("--global-batch-size", "4"), CONTEXT) == TrainState(
        seq_length=128, global_batch_size=4
    )
    path = save(tmp_path)
    state = starting_state(path, config("--global-batch-size", "4"), CONTEXT)
    assert (state.iteration, state.data_samples, caplog.messages) == (7, 28, [])
    starting_state(path, config("--global-batch-size", "8"), CONTEXT)
    assert "the global batch (8 sequences) differs from the checkpoint's (4)" in caplog.text


ON, FPDT, CHUNK = "--deterministic-mode", "--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-chunk-size"


@pytest.mark.parametrize(
    "before, now, settings",
    [
        ([FPDT, CHUNK, "64"], [FPDT, CHUNK, "32"], None),
        ([ON, FPDT, CHUNK, "64"], [ON, FPDT, CHUNK, "64"], None),
        ([ON], [ON, "--finetune"], None),
        ([ON], [], (f"with {ON}", f"without {ON}")),
        ([], [ON], (f"without {ON}", f"with {ON}")),
        ([ON, FPDT, CHUNK, "64"], [ON, FPDT, CHUNK, "32"], (f"with {CHUNK} (64)", f"with {CHUNK} (32)")),
        (
            [ON],
            [ON, FPDT, "--micro-batch-size", "2"],
            (f"with --micro-batch-size (1) and without {FPDT}", f"with --micro-batch-size (2) and with {FPDT}"),
        ),
    ],
)
def test_a_deterministic_run_that_will_not_repeat_its_bits_is_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    before: list[str],
    now: list[str],
    settings: tuple[str, str] | None,
) -> None:
    monkeypatch.setattr(CONTEXT.log, "propagate", True)
    path = save(tmp_path, STATE, *before)
    starting_state(path, config(*now, "--load", str(tmp_path), "--global-batch-size", "4"), CONTEXT)
    assert caplog.messages == [
        f"the checkpoint {path} was written {written}, and this run is {running}: its bits will differ from those of a "
        "run that was never interrupted"
        for written, running in ([settings] if settings else [])
    ]


@pytest.mark.parametrize("flags", [[], ["--universal-checkpoint", "--no-load-optim", "--no-load-rng"]])
def test_what_was_verified_when_it_was_chosen_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    path = as_deepspeed(save(tmp_path))
    torch.save({"module": {"weight": torch.ones(2)}}, path / "mp_rank_00_model_states.pt")
    (path / "manifest.json").unlink()
    seal(path)
    hashed: list[Path] = []
    sha256 = manifest._sha256
    monkeypatch.setattr(manifest, "_sha256", lambda file: hashed.append(file) or sha256(file))
    assert choose(tmp_path, *flags) == path
    assert sorted(hashed) == sorted(file for file in path.iterdir() if file.name != "manifest.json")
    load(path, *flags)
    assert len(set(hashed)) == len(hashed)
