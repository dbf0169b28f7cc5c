"""A batch in which no label counts adds nothing, whoever has it; a step of such batches alone changes no weight."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launcher import REPOSITORY
from tests.integration.runs import OFFLOADED, PLAIN, Run, base_flags, ranks, read_tensors, train

MASKED_SCRIPT = REPOSITORY / "tests/integration/masked.py"
# Of 4 samples a step: all of iteration 2; of iteration 3 those that the second of two ranks has; one of iteration 4.
MASKED = {"train": [4, 5, 6, 7, 9, 11, 13], "validation": [0, 1, 2, 3], "test": [1]}
SETTINGS = ["--train-iters", "5", "--lr-decay-style", "constant", "--eval-iters", "1", "--eval-interval", "3"]
LAYOUTS = {
    "plain": (1, [*PLAIN, *ranks(1, 0)]),
    "plain on two": (2, [*PLAIN, *ranks(1, 1)]),
    "streamed on two": (2, [*OFFLOADED, *ranks(1, 3)]),
}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Path]]:
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKED", json.dumps(MASKED))
        for name, (num_ranks, flags) in LAYOUTS.items():
            folder = tmp_path_factory.mktemp("run")
            saving = ["--save", str(folder / "checkpoints"), "--save-interval", "1"]
            flags = [*base_flags(corpus), *SETTINGS, *flags, *saving]
            results[name] = train(flags, folder / "events", num_ranks, MASKED_SCRIPT), folder / "checkpoints"
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_in_which_no_label_counts_leaves_weights_and_moments(
    runs: dict[str, tuple[Run, Path]], name: str
) -> None:
    run, checkpoints = runs[name]
    assert "every label of iteration 2 (samples 4 to 7) is masked: no step is taken" in run.output
    assert "every label of the validation data that were read is masked" in run.output
    assert "nan" not in run.output.replace("number of nan iterations:   0", "")
    assert run.validation_losses == {}
    assert list(run.losses) == [1, 3, 4, 5]
    before, after = (read_tensors(checkpoints / f"global_step{iteration}") for iteration in (1, 2))
    tensors = [key for key in before if "states.pt" in key]
    assert tensors
    assert [key for key in tensors if not torch.equal(before[key], after[key])] == []
    state = json.loads((checkpoints / "global_step5" / "train_state.json").read_text())
    assert (state["iteration"], state["data_samples"], state["skipped_iterations"]) == (5, 20, 1)


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_masked_batches_count_alike_on_one_rank_and_on_several(runs: dict[str, tuple[Run, Path]], name: str) -> None:
    want, got = runs["plain"][0], runs[name][0]
    assert got.losses == pytest.approx(want.losses, rel=1e-5)
    assert got.grad_norms == pytest.approx(want.grad_norms, rel=1e-4)
