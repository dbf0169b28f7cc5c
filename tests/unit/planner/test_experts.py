"""The estimated time of mixtures of experts, beside what was measured on GPUs (docs/planner.md)."""

import pytest
from transformers import CONFIG_MAPPING

from benchmarks.hugging_face import first_layers, model_of, one_block
from megatron.config import ModelConfig
from megatron.planner.hardware import GIB, GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.models import published_config
from megatron.planner.plan import Plan

KERNEL, CHUNK = "flash-attn-4", 32768
FULL = {"layer_types": ["full_attention"] * 36}


def plan_of(name, num_layers, length, gpu, num_gpus, **changes):
    """Return the plan for the first layers of a published model, or, with None, for one period of them."""
    sizes = dict(published_config(name)) | changes
    config = CONFIG_MAPPING[sizes["model_type"]](**sizes).to_dict()
    part = one_block(config) if num_layers is None else first_layers(config, num_layers)
    model = model_of(part, ModelConfig(num_layers=0, hidden_size=0, num_attention_heads=0, seq_length=length))
    job = Job(model, model.embedding_rows, num_gpus, CHUNK, num_gpus, device_memory_bytes=(num_gpus > 1) * 90 * GIB)
    return Plan(job, Machines(GPUS[gpu], num_gpus, num_gpus, 503), KERNEL)


@pytest.mark.parametrize(("gpu", "changes", "seconds"), [("H200", {}, 3.26), ("H200", FULL, 5.06), ("H100", {}, 3.383)])
def test_time_of_a_block_is_within_10_percent_of_what_was_measured(gpu, changes, seconds):
    plan = plan_of("gpt-oss-120b", None, 262144, gpu, 1, **changes)
    speed, num_layers = plan.speed, plan.job.model.num_layers
    assert (speed.forward + speed.backward) / num_layers == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(("num_layers", "length", "seconds"), [(8, 262144, 7.815), (4, 1048576, 54.345)])
def test_time_of_a_step_is_within_10_percent_of_what_was_measured(num_layers, length, seconds):
    assert plan_of("Qwen3-30B-A3B", num_layers, length, "H200", 4).speed.step == pytest.approx(seconds, rel=0.1)
