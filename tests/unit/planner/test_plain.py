"""Plans of runs without FPDT: against the bytes that such a run holds, and against each other."""

import re

import pytest
import torch

from megatron.config import ModelConfig
from megatron.core.parallel_state import ParallelState
from megatron.fpdt import loss as loss_module
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.planner.hardware import GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.memory import activation_bytes
from megatron.planner.models import named_model
from megatron.planner.plan import Plan
from megatron.planner.reach import advice, longest
from tests.distributed.live_bytes import LiveBytesMeter

H100 = Machines(GPUS["H100"], 4, 8, 1000)
VOCABULARY, LENGTH = 128, 2048


def plan_of(length=32768, **changes):
    model, vocabulary = named_model("gpt-1.3b", length)
    return Plan(Job(model, vocabulary, 4, length, 4, streamed=False, **changes), H100, "flash-attn-4")


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("activations", ["kept", "recomputed"])
def test_activations_are_what_a_run_holds(activations, num_layers, monkeypatch):
    """A GPT in bf16 on the CPU, whose attention kernel has no workspace."""
    monkeypatch.setattr(loss_module, "TILE_LOGITS", 2**12)
    config = ModelConfig(
        num_layers=num_layers, hidden_size=256, num_attention_heads=4, seq_length=LENGTH,
        use_rotary_position_embeddings=True, attention_backend="torch-cpu",
    ).resolved()  # fmt: skip
    execution = Execution(activation_checkpointing=activations == "recomputed")
    model = build_model(config, VOCABULARY, ParallelState(), execution, Initialization(torch.bfloat16))
    tokens, positions = torch.randint(0, VOCABULARY, (1, LENGTH)), torch.arange(LENGTH)[None]
    inputs = (tokens, tokens, torch.ones(1, LENGTH), positions)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(p.grad for p in model.parameters()), *inputs]
    with LiveBytesMeter(known) as meter:
        model(*inputs).backward()

    job = Job(config, VOCABULARY, 1, LENGTH, 1, streamed=False, activations=activations)
    reckoned, _ = activation_bytes(job, "flash-attn-4")
    assert reckoned == pytest.approx(meter.peak_bytes, rel=0.1)


def test_what_is_kept_where_takes_that_memory_and_time():
    kept, recomputed, on_host = (
        plan_of(activations=each) for each in ("kept", "recomputed", "recomputed from the host")
    )
    assert kept.memory.block > recomputed.memory.block > on_host.memory.block
    assert kept.memory.host_chunks == recomputed.memory.host_chunks == 0 < on_host.memory.host_chunks
    assert kept.speed.step < recomputed.speed.step < on_host.speed.step


def test_a_longer_sequence_takes_more_gpu_memory_and_is_told_of_fpdt():
    plan = plan_of(length=2**21, activations="recomputed")
    assert plan.memory.gpu > 2 * plan_of(length=2**19, activations="recomputed").memory.gpu
    assert not plan.fits_gpu
    assert re.search("--ds-sequence-parallel-fpdt .*--ds-sequence-parallel-fpdt-offloading .* fits", advice(plan)[0])
    assert longest(plan).job.streamed
