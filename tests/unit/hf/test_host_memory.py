"""The bytes that a streamed Hugging Face model stores on the host, beside those that its sizes let expect."""

from dataclasses import replace

import pytest

from megatron.config import ModelConfig, Recompute
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.memory_model import StreamShape
from megatron.hf.building import build_hugging_face_model
from megatron.hf.float64 import float64_stays
from megatron.hf.settings import read_model
from megatron.model.builder import Execution
from tests.unit.hf.tiny_models import BATCH, LENGTH, build, inputs

OFFLOADED = Execution(fpdt=True, chunk_size=9, slice_length=4, offloading=True)
FLAGS = ModelConfig(num_layers=0, hidden_size=0, num_attention_heads=0, seq_length=LENGTH)


# Estimated too high by at most: what a window releases early, and the products of narrower layers.
@pytest.mark.parametrize(
    ("family", "excess"),
    [
        *[(family, 0.0) for family in ("llama", "qwen3_moe", "glm4", "gpt_neox", "gpt2")],
        *[("deepseek_v3", 0.05), ("gemma2", 0.06), ("llama4_text", 0.06)],
    ],
)
@pytest.mark.parametrize("recompute", Recompute)
def test_a_step_stores_what_the_planner_estimates_and_never_more(tmp_path, family, excess, recompute):
    with float64_stays():
        model = build(family).eval()
        model.config.save_pretrained(tmp_path)
        streamed = build_hugging_face_model(model, ParallelState(), replace(OFFLOADED, recompute=recompute))
        streamed(*inputs()).backward()
    used = streamed.execution.stream.store.pool.peak_used_bytes
    shape = StreamShape.of(read_model(tmp_path, FLAGS), OFFLOADED.chunk_size, 1, BATCH, element_size=8)
    estimated = replace(shape, slice_length=OFFLOADED.slice_length).tier_bytes(1, recompute)
    assert used <= estimated <= used * (1 + excess)
