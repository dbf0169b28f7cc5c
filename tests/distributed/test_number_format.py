"""Weights are partitioned in the number format of the run, whatever formats the machine computes in."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tests.distributed.engine_case import Layout, Model, build, module_weights
from tests.distributed.rank_pool import RankPool


def changed_weights(has_fp16: bool) -> list[str]:
    """Return the weights of a ZeRO-3 engine in fp32 that are not those which the model was built with."""
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: has_fp16
    weights = module_weights(build(Layout(1, 3), seed=1))
    return [name for name, built in Model(seed=1).named_parameters() if not torch.equal(weights[name], built)]


@pytest.mark.parametrize("has_fp16", [False, True])
def test_fp32_stays_fp32_under_zero_3(has_fp16: bool) -> None:
    with RankPool() as ranks:
        assert ranks.run(changed_weights, has_fp16, num_ranks=1, timeout_seconds=120) == [[]]
