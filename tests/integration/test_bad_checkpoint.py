"""A checkpoint that cannot serve ends a run as other mistakes do: one line that helps, exit code 2, no file written."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.weights.manifest import seal
from tests.integration.runs import OFFLOADED, Ranks, base_flags, ranks, train
from tests.integration.test_bad_input import assert_one_clear_line, files_below, run_into_error

OPTIMIZER_STATES = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
ZERO_1 = ["--zero-stage", "1", "--train-iters", "2"]


@dataclass(frozen=True)
class Case:
    """Flags of a run that continues from a ZeRO-1 checkpoint of one rank, and words that the answer must hold."""

    name: str
    flags: list[str]
    words: list[str]
    num_ranks: int = 1
    damage: Callable[[Path], None] = lambda checkpoint: None


def _cut_weights(checkpoint: Path) -> None:
    path = checkpoint / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])


def _remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def _flip_a_byte_of_the_moments(checkpoint: Path) -> None:
    path = checkpoint / OPTIMIZER_STATES
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class _Executes:
    """A pickle that writes a file when it is read by who runs what it names."""

    def __init__(self, file: Path) -> None:
        self._code = f"open({str(file)!r}, 'w').close()"

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self._code,)


def _plant_code(name: str) -> Callable[[Path], None]:
    """Put code into a file, and compute the manifest again as whoever can write there could."""

    def plant(checkpoint: Path) -> None:
        torch.save({"module": {}, "x": _Executes(checkpoint.parent / "executed")}, checkpoint / name)
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint)

    return plant


def _lead_latest_out(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.parent.parent / "elsewhere" / "global_step2")
    (checkpoint.parent / "latest").write_text("../elsewhere/global_step2")


CASES = [
    Case("a typo", ["--load", "absent"], ["--load (absent) is not there", "name a folder of checkpoints"]),
    Case("a typo with finetune", ["--load", "absent", "--finetune"], ["--load (absent) is not there"]),
    Case("latest leads out", [], ["latest holds '../elsewhere/global_step2'"], damage=_lead_latest_out),
    Case("code in weights", [], ["names exec, which", "not run"], damage=_plant_code("mp_rank_00_model_states.pt")),
    Case("code in moments", [], [OPTIMIZER_STATES, "names exec, which"], damage=_plant_code(OPTIMIZER_STATES)),
    Case("code in random", [], ["random_0.pt", "names exec, which"], damage=_plant_code("random_0.pt")),
    Case("another width", ["--hidden-size", "64"], ["--hidden-size is 32 in the checkpoint and 64 in the flags"]),
    Case("counters missing", [], ["train_state.json is missing"], damage=_remove("train_state.json")),
    Case("shard missing", [], [f"{OPTIMIZER_STATES} is missing"], damage=_remove(OPTIMIZER_STATES)),
    Case("flipped byte", [], [f"{OPTIMIZER_STATES} is damaged: its SHA-256"], damage=_flip_a_byte_of_the_moments),
    Case("no manifest", [], ["no manifest.json", "--allow-unverified-checkpoint"], damage=_remove("manifest.json")),
    Case("one that is not there", ["--ckpt-step", "7"], ["global_step7 is missing", "name another --ckpt-step"]),
    Case("another vocabulary", ["--vocab-size", "300"], ["128", "384"]),
    Case("another number of ranks", [], ["1 ranks", "2 ranks"], num_ranks=2),
    Case("another ZeRO stage", ["--zero-stage", "3"], ["--zero-stage", "1", "3"]),
    Case("another number format", ["--bf16"], ["--bf16"]),
    Case("damaged weights", [], ["mp_rank_00_model_states.pt is damaged"], damage=_cut_weights),
]


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of one rank under ZeRO-1, at iteration 2."""
    folder = tmp_path_factory.mktemp("bad_checkpoint")
    train([*base_flags(corpus), *ZERO_1, "--save", str(folder / "saved")], folder / "events")
    return folder / "saved"


def assert_refused(corpus: Path, saved: Path, folder: Path, case: Case) -> None:
    own = folder / "saved"
    shutil.copytree(saved, own)
    case.damage(own / "global_step2")
    before = files_below(folder)
    flags = [*base_flags(corpus), *ZERO_1, "--load", str(own), "--save", str(folder / "new"), *case.flags]
    assert_one_clear_line(run_into_error(flags, case.num_ranks)[0], case.words)
    assert files_below(folder) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_checkpoint_that_cannot_serve_is_refused(corpus: Path, saved: Path, tmp_path: Path, case: Case) -> None:
    assert_refused(corpus, saved, tmp_path, case)


def test_a_damaged_shard_of_another_rank_costs_the_steps_since_the_checkpoint_before(
    corpus: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    flags = [*base_flags(corpus), *OFFLOADED, *ranks(2, 3), "--save", str(saved), "--load", str(saved)]
    whole = train([*flags, "--train-iters", "4", "--save-interval", "2"], tmp_path / "whole", 2)
    shard = saved / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    resumed = train([*flags, "--train-iters", "4"], tmp_path / "resumed", 2)
    assert resumed.losses == {step: whole.losses[step] for step in (3, 4)}
    (warning,) = [line for line in resumed.output.splitlines() if line.startswith("WARNING: the checkpoint")]
    assert f"{shard.name} is damaged" in warning
    assert "global_step2, in its place" in warning


def test_a_second_run_with_the_same_folder_is_refused_and_the_first_goes_on(corpus: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    flags = [*base_flags(corpus), "--train-iters", "100000", "--save", str(saved), "--save-interval", "1000"]
    with Ranks(flags) as first:
        first.wait_for("iteration        1/")
        before = files_below(tmp_path)
        words = ["is in use by another run", f"process {first.processes[0].pid} on host", "name another folder"]
        assert_one_clear_line(run_into_error([*flags, "--load", str(saved), "--lr", "1e-5"], 1)[0], words)
        assert before <= files_below(tmp_path)
        first.processes[0].send_signal(signal.SIGTERM)
        (ended,) = first.wait()
    assert ended.exit_code == 0
    assert (saved / "latest").is_file()
    assert not (saved / "run.lock").exists()
