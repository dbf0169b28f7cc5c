from dataclasses import replace

import pytest

from megatron.fpdt.memory_model import StreamShape, choose_checkpoint_interval
from tests.unit.model.small_model import OFFLOADED, small_config, small_inputs, small_model

LENGTH, BATCH = 40, 2
SHAPE = StreamShape(
    num_layers=32, hidden_size=4096, num_heads=32, num_key_value_heads=8, head_size=128, sequence_length=2**20,
    batch_size=1, sequence_parallel_size=4, element_size=2,
)  # fmt: skip
GIB = 2**30


def shape_of(config):
    return StreamShape(
        config.num_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        config.kv_channels, config.seq_length, BATCH, 1, 8,
    )  # fmt: skip


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5])
@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_a_step_takes_up_what_the_model_says(num_layers, interval):
    config = small_config(LENGTH, num_layers=num_layers)
    model = small_model(config, replace(OFFLOADED, checkpoint_interval=interval))
    model(*small_inputs(config, BATCH)).backward()
    used = model.execution.store.pool.peak_used_bytes
    assert used == pytest.approx(shape_of(config).tier_bytes(interval), rel=0.01)


def test_llama_3_8b_at_a_million_tokens_on_four_gpus():
    """Per token and layer: x and o 8192 bytes each, lse 128, K and V 4096; dK and dV of one layer 8192."""
    tokens = 2**18
    assert SHAPE.residual_bytes == 8192 * tokens
    assert SHAPE.kept_bytes == (8192 + 128 + 4096) * tokens
    assert SHAPE.tier_bytes(1) == tokens * (32 * (8192 + 128 + 4096) + 34 * 8192 + 8192)


@pytest.mark.parametrize("budget, expected", [(10**13, 1), (SHAPE.tier_bytes(1), 1), (SHAPE.tier_bytes(1) - 1, 2)])
def test_the_interval_is_the_shortest_that_fits(budget, expected):
    assert choose_checkpoint_interval(SHAPE, budget) == expected


def test_where_nothing_fits_it_is_the_thriftiest():
    interval = choose_checkpoint_interval(SHAPE, 0)
    assert SHAPE.tier_bytes(interval) == min(SHAPE.tier_bytes(k) for k in range(1, 33))
    assert SHAPE.tier_bytes(interval) < 0.7 * SHAPE.tier_bytes(1)


def test_fewer_key_value_heads_than_ranks_are_replicated():
    assert (
        replace(SHAPE, num_key_value_heads=1).key_value_elements
        == replace(SHAPE, num_key_value_heads=4).key_value_elements
    )
