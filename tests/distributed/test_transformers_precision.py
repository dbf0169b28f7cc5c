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
from tests.unit.hf.families import config_of

BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
NUM_EXPERTS = 8


def formats(zero_stage: int) -> tuple[set[torch.dtype], set[torch.dtype], set[tuple[torch.dtype, ...]]]:
    """Train a step; return the formats of weights, of corrections, and of the operands of the routers' products."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    empty = empty_model(config_of("deepseek_v3"), BF16)

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
    corrections = {buffer.dtype for name, buffer in engine.module.named_buffers() if "correction" in name}
    return weights, corrections, operands


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_routers_multiply_in_fp32_with_weights_in_bf16(zero_stage: int) -> None:
    """transformers would hold these weights in fp32; DeepSpeed has one number format for all."""
    with RankPool() as pool:
        results = pool.run(formats, zero_stage, num_ranks=2, timeout_seconds=120)
    assert results == [({BF16}, {FP32}, {(FP32, FP32)})] * 2
