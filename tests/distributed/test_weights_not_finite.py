"""Each rank names the weights of its own that are not finite; what pads its shards is no weight."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.engine_case import FROZEN, Layout, build, steps
from tests.distributed.rank_pool import RankPool

LARGE = "embedding.weight"


def named(zero_stage: int) -> list[list[str]]:
    """Return what this rank names of an engine as it is built, with NaN behind its shards, and in two weights."""
    engine = build(Layout(2, zero_stage), seed=1)
    said = [engine.weights_not_finite()]
    parameters = dict(engine.module.named_parameters())
    for parameter in parameters.values():
        if zero_stage == 3:
            shard = parameter.ds_tensor.data.flatten()
            shard[max(0, parameter.ds_numel - dist.get_rank() * len(shard)) :] = torch.nan
    said.append(engine.weights_not_finite())
    if dist.get_rank() == 1:
        for name in (LARGE, FROZEN):
            getattr(parameters[name], "ds_tensor", parameters[name]).data.flatten()[0] = torch.inf
    return [*said, engine.weights_not_finite()]


def states_are_finite() -> list[bool]:
    """Return whether each state of Adam is finite after a step, where memory that nobody writes holds NaN."""
    torch.use_deterministic_algorithms(True)  # fills such memory
    engine = build(Layout(2, 3), seed=1)
    steps(engine, 0, 1)
    adam = engine._engine.optimizer.optimizer
    states = [state for weights in adam.state for state in (weights, *adam.state[weights].values())]
    return [bool(torch.isfinite(state).all()) for state in states]


def test_what_pads_a_shard_does_not_depend_on_what_the_memory_held() -> None:
    with RankPool() as ranks:
        for finite in ranks.run(states_are_finite, num_ranks=2, timeout_seconds=120):
            assert len(finite) == 8
            assert all(finite)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_rank_names_what_it_holds(zero_stage: int) -> None:
    with RankPool() as ranks:
        first, second = ranks.run(named, zero_stage, num_ranks=2, timeout_seconds=120)
    assert first == [[], [], []]
    assert second == [[], [], [LARGE, FROZEN]]
