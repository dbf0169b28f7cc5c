"""One model, two ways of executing it: trained plainly at a short context, it goes on with FPDT at four times that.

The second run has another sequence-parallel size and cuts the sequence into chunks; its first loss is that of the same
weights computed plainly, and it keeps the optimizer's moments, as the number of ranks is the same.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.integration.runs import LLAMA, OFFLOADED, SEQ_LENGTH, Run, base_flags, ranks, train

SHORT_ITERS, LONG_ITERS = 10, 4
LONG = ["--seq-length", str(4 * SEQ_LENGTH), "--max-position-embeddings", str(4 * SEQ_LENGTH)]
CHUNK = ["--ds-sequence-parallel-fpdt-chunk-size", "72"]  # 72, 72, 72 and 40
FINETUNE = ["--finetune", "--train-iters", "1"]
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Story:
    """A short plain run, its continuation with FPDT at a longer context, and one plain step at that length."""

    folder: Path
    short: Run
    long: Run
    plain_step: Run


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)], ids=["zero1", "zero3"])
def story(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Train short on two data-parallel ranks, then long on two sequence-parallel ones."""
    folder = tmp_path_factory.mktemp("story")
    flags = base_flags(corpus, LLAMA)
    saved, continued = str(folder / "short"), str(folder / "long")
    plain, streamed = ranks(1, request.param), [*OFFLOADED, *CHUNK, *ranks(2, request.param)]
    length = ["--train-iters", str(SHORT_ITERS)]
    longer = ["--train-iters", str(SHORT_ITERS + LONG_ITERS), "--load", saved, "--save", continued]
    return Story(
        folder,
        short=train([*flags, *plain, *length, "--save", saved], folder / "short_events", 2),
        long=train([*flags, *streamed, *LONG, *longer], folder / "long_events", 2),
        plain_step=train([*flags, *plain, *LONG, *FINETUNE, "--load", saved], folder / "plain_events", 2),
    )


def test_the_first_loss_at_the_longer_context_is_that_of_the_same_weights_run_plainly(story: Story) -> None:
    assert story.long.losses[SHORT_ITERS + 1] == pytest.approx(story.plain_step.losses[1], rel=TOLERANCE)
    assert story.long.grad_norms[SHORT_ITERS + 1] == pytest.approx(story.plain_step.grad_norms[1], rel=1e-4)


def test_training_goes_on_where_it_stopped(story: Story) -> None:
    assert list(story.long.losses) == list(range(SHORT_ITERS + 1, SHORT_ITERS + LONG_ITERS + 1))
    assert max(story.long.losses.values()) < story.short.losses[SHORT_ITERS] + 0.05


def test_parameters_have_the_same_names_and_shapes_with_and_without_fpdt(story: Story) -> None:
    def shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
        (path, *_) = sorted((story.folder / checkpoint).glob("*mp_rank_00_model_states.pt"))
        state = torch.load(path, weights_only=False)
        return {name: tuple(shape) for group in state["param_shapes"] for name, shape in group.items()}

    assert shapes(f"short/global_step{SHORT_ITERS}")
    assert shapes(f"short/global_step{SHORT_ITERS}") == shapes(f"long/global_step{SHORT_ITERS + LONG_ITERS}")


def test_the_data_start_again_at_another_length_and_the_log_says_so(story: Story) -> None:
    assert f"--seq-length ({4 * SEQ_LENGTH}) differs from the checkpoint's ({SEQ_LENGTH})" in story.long.output
    state = json.loads((story.folder / f"long/global_step{SHORT_ITERS + LONG_ITERS}/train_state.json").read_text())
    assert state["data_samples"] == 4 * LONG_ITERS
    assert state["consumed_samples"] == 4 * (SHORT_ITERS + LONG_ITERS)
    assert state["consumed_tokens"] == 4 * SEQ_LENGTH * (SHORT_ITERS + 4 * LONG_ITERS)
