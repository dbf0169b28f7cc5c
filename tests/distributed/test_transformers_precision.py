"""The number formats of a Hugging Face model under --bf16."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.config import OptimizerConfig
from megatron.core.parallel_state import ParallelState
from megatron.engine.engine import Engine
from megatron.hf.building import build_hugging_face_model
from megatron.hf.materialization import empty_model, materialize
from megatron.hf.model import UNITS
from megatron.model.builder import Execution
from megatron.model.initialization import Initialization
from megatron.optimizer.param_groups import parameter_groups
from tests.distributed.rank_pool import RankPool
from tests.distributed.transformers_case import batch_of
from tests.unit.hf.tiny_models import config_of

BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
NUM_EXPERTS = 8
CORRECTIONS = ("correction_bias", "expert_bias")


CASES = [("deepseek_v3", 0), ("deepseek_v3", 1), ("deepseek_v3", 3), ("afmoe", 3), ("ernie4_5_moe", 1)]

Formats = tuple[set[torch.dtype], set[torch.dtype], set[tuple[torch.dtype, ...]]]


def formats(family: str, zero_stage: int) -> Formats:
    """Train a step; return the formats of weights, of corrections, and of the operands of the routers' products."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    empty = empty_model(config_of(family), BF16)

    def provide() -> Any:
        materialize(empty, Initialization(BF16, CPU, seed=3), random=True)
        return build_hugging_face_model(empty, ParallelState.create(1), Execution(fpdt=True, chunk_size=16))

    settings = {
        **{"train_batch_size": dist.get_world_size(), "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9},
        **{"bf16": {"enabled": True}, "zero_optimization": {"stage": zero_stage}},
    }
    engine = Engine(provide, UNITS, lambda each: parameter_groups(each, 0.0), OptimizerConfig(lr=1e-3), settings, CPU)
    operands: set[tuple[torch.dtype, ...]] = set()
    linear = F.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == NUM_EXPERTS:
            operands.add((x.dtype, weight.dtype))
        return linear(x, weight, bias)

    inputs = list(batch_of(0, 1))
    with mock.patch.object(F, "linear", noted):
        engine.train_step([inputs], inputs[2].sum(), 1e-3)
    weights = {parameter.dtype for parameter in engine.module.parameters()}
    corrections = {b.dtype for name, b in engine.module.named_buffers() if name.endswith(CORRECTIONS)}
    return weights, corrections, operands


def formats_of_all() -> list[Formats]:
    return [formats(*case) for case in CASES]


@pytest.fixture(scope="module")
def found() -> list[list[Formats]]:
    """The formats of each case, by rank."""
    with RankPool() as pool:
        return pool.run(formats_of_all, num_ranks=2, timeout_seconds=300)


def test_weights_are_in_bf16_and_corrections_of_routers_in_fp32(found: list[list[Formats]]) -> None:
    """transformers would hold a router's weights in fp32, too; DeepSpeed has one number format for all parameters."""
    assert all((weights, corrections) == ({BF16}, {FP32}) for rank in found for weights, corrections, _ in rank)


def test_routers_multiply_in_fp32(found: list[list[Formats]]) -> None:
    for rank in found:
        for (family, _), (_, _, operands) in zip(CASES, rank, strict=True):
            assert operands == {(FP32, FP32)} or family != "deepseek_v3"
