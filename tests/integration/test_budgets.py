"""A run resumed at another batch, length or number of ranks takes what its budget leaves, no more and no less."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.runs import LLAMA, SEQ_LENGTH, SIZES, TOKENIZER, base_flags, train

BATCH, STEPS = 4, 4
CONSUMED = BATCH * STEPS
LONGER = ["--seq-length", str(2 * SEQ_LENGTH), "--max-position-embeddings", str(2 * SEQ_LENGTH)]


@dataclass(frozen=True)
class Case:
    """Flags of the resumed run, the iterations it takes, the samples and tokens consumed after it, and what it says."""

    flags: list[str]
    iterations: list[int]
    samples: int
    tokens: int
    says: str

    def __str__(self) -> str:
        return "_".join(word.removeprefix("--") for word in self.flags[:4])


CASES = [
    Case(
        ["--train-iters", "9", "--global-batch-size", "1"],
        [5, 6, 7, 8, 9], CONSUMED + 5, (CONSUMED + 5) * SEQ_LENGTH,
        "the global batch (1 sequences) differs from the checkpoint's (4)",
    ),
    Case(
        ["--train-samples", "39", "--global-batch-size", "10"],
        [5, 6], CONSUMED + 20, (CONSUMED + 20) * SEQ_LENGTH,
        "to iteration 6: --train-samples (39) leaves 2 iterations of 10 samples",
    ),
    Case(
        ["--train-samples", "1000", "--train-tokens", str(30 * SEQ_LENGTH), *LONGER],
        [5], CONSUMED + 4, (CONSUMED + 8) * SEQ_LENGTH,
        f"--train-tokens ({30 * SEQ_LENGTH}) leaves 1 iteration of 4 samples",
    ),
    Case(
        ["--train-samples", "19"],
        [], CONSUMED, CONSUMED * SEQ_LENGTH,
        "nothing to train: --train-samples (19) leaves 0 iterations of 4 samples",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    length = ["--train-iters", "9", "--exit-interval", str(STEPS)]
    train([*base_flags(corpus), *LONGER[2:], *length, "--save", str(folder)], folder / "events")
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_takes_what_its_budget_leaves(
    corpus: Path, checkpoints: Path, tmp_path: Path, case: Case
) -> None:
    saved = tmp_path / "saved"
    folders = ["--load", str(checkpoints), "--save", str(saved)]
    run = train([*base_flags(corpus), *LONGER[2:], *case.flags, *folders], tmp_path / "events")
    assert list(run.losses) == case.iterations
    assert case.says in run.output
    assert ("nothing to train" in run.output) == (not case.iterations)
    last = (saved if case.iterations else checkpoints) / f"global_step{STEPS + len(case.iterations)}"
    state = json.loads((last / "train_state.json").read_text())
    assert (state["consumed_samples"], state["consumed_tokens"]) == (case.samples, case.tokens)


def test_a_default_batch_that_follows_the_ranks_is_said(corpus: Path, tmp_path: Path) -> None:
    flags = [*SIZES, *TOKENIZER, *LLAMA, "--lr", "3e-3", "--log-interval", "1", "--eval-iters", "0"]
    flags += ["--data-path", str(corpus), "--micro-batch-size", "2", "--train-samples", "12"]
    note = "note: --global-batch-size is not given: {}, --micro-batch-size (2) x the data-parallel size ({})"
    saved = str(tmp_path / "saved")
    first = train([*flags, "--save", saved, "--exit-interval", "2"], tmp_path / "first")
    assert note.format(2, 1) in first.output
    assert "differs from" not in first.output
    second = train([*flags, "--load", saved, "--universal-checkpoint"], tmp_path / "second", 2)
    assert note.format(4, 2) in second.output
    assert "the global batch (4 sequences) differs from the checkpoint's (2)" in second.output
    assert list(second.losses) == [3, 4]
    assert re.search(r"iteration +4/ +4 \| consumed samples: +12 \|", second.output)
