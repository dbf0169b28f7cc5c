"""The checkpoint that was chosen is loaded, at every ZeRO stage, with the optimizer states and without."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.loading import load_checkpoint
from tests.distributed.engine_case import Layout, build, module_weights, steps
from tests.distributed.rank_pool import RankPool
from tests.unit.checkpointing.pretend import CONTEXT, config

FLAGS: dict[str, list[str]] = {"weights": ["--finetune"], "no moments": ["--no-load-optim"], "all": []}
OLDER, NEWEST = "global_step1", "global_step2"
ROUND_ROBIN = "round_robin_gradients"
CHANGES = [(Layout(2, stage), Layout(2, stage)) for stage in range(4)]
# As DeepSpeed's own reader does not see.
CHANGES += [
    (Layout(2, 1), Layout(2, 1, switch=ROUND_ROBIN)),
    (Layout(2, 2, switch=ROUND_ROBIN), Layout(2, 2)),
]


@dataclass(frozen=True)
class Loaded:
    """The weights that were saved, those loaded in each way, and the losses of the next two steps of both."""

    want: dict[str, torch.Tensor]
    got: dict[str, dict[str, torch.Tensor]]
    wanted_losses: list[float]
    losses: list[float]


def load_older(changes: list[tuple[Layout, Layout]], folder: Path) -> list[Loaded]:
    """For each change save two steps, of which `latest` names the second; load the first in each way."""
    return [_load_older(saved, loading, folder / f"{saved}-{loading}") for saved, loading in changes]


def _load_older(saved: Layout, loading: Layout, folder: Path) -> Loaded:
    engine = build(saved, seed=1)
    steps(engine, 0, 1)
    want, losses = module_weights(engine), []
    for tag in (OLDER, NEWEST):
        (folder / tag).mkdir(parents=True, exist_ok=True)
        engine.save(folder, tag)
        (folder / tag / "train_state.json").write_text("{}")
        losses += steps(engine, 1, 2) if tag == OLDER else []
    (folder / "latest").write_text(NEWEST)
    got = {}
    for name, flags in FLAGS.items():
        engine = build(loading, seed=2)
        load_checkpoint(folder / OLDER, engine, CONTEXT, config("--load", str(folder), "--no-load-rng", *flags))
        got[name] = module_weights(engine)
    return Loaded(want, got, losses, steps(engine, 1, 2))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Layout, Layout], Loaded]:
    with RankPool() as pool:
        folder = tmp_path_factory.mktemp("checkpoints")
        results = pool.run(load_older, CHANGES, folder, num_ranks=2, timeout_seconds=200)[0]
    return dict(zip(CHANGES, results, strict=True))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}-to-{change[1]}")
def test_a_checkpoint_other_than_the_newest_is_loaded_where_it_was_chosen(
    loaded: dict[tuple[Layout, Layout], Loaded], change: tuple[Layout, Layout]
) -> None:
    case = loaded[change]
    wrong = [
        (how, name) for how, got in case.got.items() for name in got if not torch.equal(got[name], case.want[name])
    ]
    assert (wrong, list(case.got)) == ([], list(FLAGS))
    assert case.losses == pytest.approx(case.wanted_losses, rel=1e-6)
