"""Documents in packed sequences: however a run is executed, they do not see each other, and positions begin anew."""

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_dataset import IndexedDatasetWriter
from tests.integration.corpus import VOCAB_SIZE
from tests.integration.runs import KEPT, LLAMA, MODELS, OFFLOADED, PLAIN, REBUILT, Run, base_flags, ranks, train

FLAGS = ["--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"]
SETTINGS = ["--train-iters", "5", "--eval-iters", "1", "--eval-interval", "5", "--micro-batch-size", "2"]


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix, random = tmp_path_factory.mktemp("documents") / "short", np.random.default_rng(4)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in random.geometric(0.05, 3000):
            writer.add_document(np.append(random.integers(0, VOCAB_SIZE, length), VOCAB_SIZE))
    return prefix


def losses_of(run: Run) -> list[float]:
    return [*run.losses.values(), *run.validation_losses.values(), *run.grad_norms.values()]


@pytest.mark.parametrize("model", MODELS)
def test_every_execution_arrives_at_the_same_losses(short_documents: Path, tmp_path: Path, model: str) -> None:
    flags = [*base_flags(short_documents, MODELS[model]), *SETTINGS, *FLAGS]
    plain = losses_of(train([*flags, *PLAIN], tmp_path / "plain"))
    others = {
        "offloaded": ([*OFFLOADED, *ranks(2, 3)], 2),
        "rebuilt, products kept": ([*REBUILT, *KEPT], 1),
        "recomputed": (["--deepspeed-activation-checkpointing", *ranks(2, 1)], 2),
    }
    for name, (execution, num_ranks) in others.items():
        run = losses_of(train([*flags, *execution], tmp_path / name, num_ranks))
        assert run == pytest.approx(plain, rel=2e-5), name


def test_each_flag_counts(short_documents: Path, tmp_path: Path) -> None:
    flags = [*base_flags(short_documents, LLAMA), *SETTINGS, *OFFLOADED]
    sets = [[], *([flag] for flag in FLAGS), FLAGS[:2]]
    runs = [losses_of(train([*flags, *given], tmp_path / str(i))) for i, given in enumerate(sets)]
    none, positions, attention, loss, both = runs
    assert len({run[4] for run in (none, positions, attention, loss)}) == 4
    # Rotary positions are relative: within a document they may begin anywhere.
    assert both == pytest.approx(attention, rel=2e-5)
