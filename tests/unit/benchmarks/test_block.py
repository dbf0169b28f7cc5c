import gc
import weakref

import pytest
import torch

from benchmarks.block import (
    OFFLOADED,
    ON_DEVICE,
    RECOMPUTED,
    Ceiling,
    GraphContestant,
    ModelBlock,
    Source,
    above_weights,
    measure,
)
from benchmarks.common import TINY_GEOMETRY, Geometry
from megatron.model.builder import Execution

CPU = torch.device("cpu")
TINY = Geometry(**TINY_GEOMETRY)
LENGTH = 80


def test_ways_of_running_configure_the_model():
    assert OFFLOADED.execution(32) == Execution(fpdt=True, chunk_size=32, offloading=True)
    assert ON_DEVICE.execution(32) == Execution(fpdt=True, chunk_size=32)
    assert RECOMPUTED.execution(32) == Execution(activation_checkpointing=True, checkpoint_in_cpu=True)


def test_model_flops_count_the_triangle_once_and_products_three_times():
    h, f, S = TINY.hidden_size, TINY.ffn_hidden_size, LENGTH
    q, kv = TINY.num_attention_heads * TINY.kv_channels, TINY.num_key_value_heads * TINY.kv_channels
    products = 2 * S * (h * (q + 2 * kv) + q * h + 3 * h * f)
    expected = 3 * (products + 2 * S**2 * q)
    assert ModelBlock(TINY.model_config(LENGTH), OFFLOADED.execution(32), CPU).model_flops == expected
    assert Ceiling(TINY, LENGTH, "auto", CPU).model_flops == expected


def test_ceiling_multiplies_by_every_weight_of_the_block():
    block = ModelBlock(TINY.model_config(LENGTH), OFFLOADED.execution(32), CPU)
    norms, vocabulary = 3 * TINY.hidden_size, 2 * 128 * TINY.hidden_size  # not in the ceiling
    assert Ceiling(TINY, LENGTH, "auto", CPU).weight_bytes == block.weight_bytes - 4 * (norms + vocabulary)


@pytest.mark.parametrize("way", [OFFLOADED, ON_DEVICE, RECOMPUTED], ids=lambda way: way.name)
def test_every_pass_recomputes_every_gradient(way):
    block = ModelBlock(TINY.model_config(LENGTH), way.execution(32), CPU)
    for _ in range(2):
        block.prepare()
        assert all(weight.grad is None for weight in block._weights)
        block.forward()
        block.backward()
        assert all(weight.grad is not None for weight in block._weights)


def test_all_ways_compute_the_same_gradients(monkeypatch):
    gradients = []
    x = torch.randn(LENGTH, 1, TINY.hidden_size)
    for way in (OFFLOADED, ON_DEVICE, RECOMPUTED):
        block = ModelBlock(TINY.model_config(LENGTH), way.execution(32), CPU)
        block._make_x, block._dy = x.clone, x
        block.prepare()
        block.forward()
        block.backward()
        gradients.append([weight.grad for weight in block._weights])
    for others in gradients[1:]:
        for gradient, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3)


def test_only_the_streamed_block_sums_its_gradients_in_fp32():
    blocks = [ModelBlock(TINY.model_config(LENGTH), way.execution(32), CPU) for way in (OFFLOADED, RECOMPUTED)]
    numbers = sum(weight.numel() for weight in blocks[0]._weights)
    assert [block.gradient_bytes for block in blocks] == [4 * numbers, 4 * numbers]  # weights are fp32 on a CPU
    assert blocks[0].host_bytes() is not None
    assert blocks[1].host_bytes() is None


def test_the_graph_keeps_neither_input_nor_output():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            gradients.append(dy)
            return 2 * dy

    gradients, alive = [], []

    def make():
        x = torch.ones(3)
        alive.append(weakref.ref(x.untyped_storage()))
        return x

    def run(x):
        y = Double.apply(x)
        alive.append(weakref.ref(y.untyped_storage()))
        return y

    dy = torch.arange(3.0)
    contestant = GraphContestant(run, [], make, dy)
    contestant.prepare()
    contestant.forward()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    contestant.backward()
    assert torch.equal(gradients[0], dy)


def test_source_gives_an_input_that_needs_a_gradient():
    x = Source.apply(torch.zeros((), requires_grad=True), lambda: torch.ones(2))
    assert x.requires_grad
    assert not x.is_leaf


@pytest.mark.parametrize("forward, backward, expected", [(150, 130, 30), (100, 200, 60), (None, None, None)])
def test_the_peak_leaves_out_what_was_there_weights_and_in_backward_their_gradients(forward, backward, expected):
    assert above_weights(forward, backward, before=20, weight_bytes=100, gradient_bytes=20) == expected


def test_measured_row_has_rates_ratios_and_host_bytes():
    row = measure(
        lambda: ModelBlock(TINY.model_config(LENGTH), OFFLOADED.execution(32), CPU), CPU, matmul=2.0, repeats=2
    )
    assert row["model_tflops"] > 0
    assert row["times_matmul"] == pytest.approx(row["model_tflops"] / 2.0)
    assert row["host_used_gib"] == row["host_allocated_gib"] > 0
    assert row["above_gib"] is None  # nobody counts on a CPU


def test_memory_that_runs_out_while_building_is_a_row():
    def build():
        raise torch.OutOfMemoryError

    assert measure(build, CPU, matmul=1.0, repeats=1) == {"failed": "out of GPU memory"}
