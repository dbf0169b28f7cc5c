from dataclasses import replace
from itertools import product

import pytest

from megatron.config import ModelConfig, Recompute
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt import address_space, host_pool
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.disk_budget import BUSY_KINDS
from megatron.fpdt.memory_model import (
    StreamShape,
    TierBudget,
    choose_saved_activations,
    least_bytes,
    longest_sequence,
    lowest_memory,
)
from megatron.fpdt.placement import place
from megatron.fpdt.staging import LEAST_STAGING_BYTES
from tests.unit.model.small_model import OFFLOADED, small_config, small_inputs, small_model

LENGTH, BATCH = 40, 2
LLAMA = ModelConfig(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_key_value_heads=8,
    swiglu=True, use_rotary_position_embeddings=True, seq_length=2**20,
).resolved()  # fmt: skip
SHAPE = StreamShape.of(LLAMA, 2**17, sequence_parallel_size=4, batch_size=1, element_size=2)
SLICE_LENGTH = 6
RECOMPUTE = pytest.mark.parametrize("recompute", list(Recompute))


def shape_of(config):
    shape = StreamShape.of(config, OFFLOADED.chunk_size, sequence_parallel_size=1, batch_size=BATCH, element_size=8)
    return replace(shape, slice_length=SLICE_LENGTH)


@pytest.mark.parametrize(
    "num_layers, interval", [*product([1, 2, 3, 5], [1, 2, 3, 4]), (8, 7), (13, 6)], ids=lambda n: str(n)
)
@RECOMPUTE
@pytest.mark.parametrize("parallel", [False, True])
def test_a_step_uses_the_memory_that_the_model_estimates(num_layers, interval, recompute, parallel):
    config = small_config(LENGTH, num_layers=num_layers, parallel_residual=parallel)
    model = small_model(
        config, replace(OFFLOADED, checkpoint_interval=interval, recompute=recompute, slice_length=SLICE_LENGTH)
    )
    model(*small_inputs(config, BATCH)).backward()
    used = model.execution.store.pool.peak_used_bytes
    assert used == pytest.approx(shape_of(config).tier_bytes(interval, recompute), rel=0.01)


@pytest.mark.parametrize(
    "recompute, interval, host_share, device_share",
    [(Recompute.KV, 1, 0.0, 0.0), (Recompute.KV, 3, 0.4, 0.0), (Recompute.NONE, 1, 0.8, 0.1)],
)
def test_host_and_disk_share_a_step_as_divided(tmp_path, monkeypatch, recompute, interval, host_share, device_share):
    monkeypatch.setattr(address_space, "ALIGNMENT", 64)  # a sector would be much for such small tensors
    config = small_config(LENGTH, num_layers=13)
    shape = shape_of(config)
    device = shape.device_budget(int(device_share * shape.tier_bytes(interval, recompute)), interval, recompute)
    needed = shape.kind_bytes(interval, recompute)
    busy = sum(needed[kind] for kind in BUSY_KINDS)
    host = int(busy + host_share * (sum(needed.values()) - busy)) + LEAST_STAGING_BYTES
    budget = TierBudget(host, device.total_bytes, 2**30)
    divided = shape.on_host_and_disk(budget, interval, recompute)
    assert (divided.staging_bytes, divided.host_bytes) == (LEAST_STAGING_BYTES, host - LEAST_STAGING_BYTES)
    how = replace(OFFLOADED, checkpoint_interval=interval, recompute=recompute, slice_length=SLICE_LENGTH)
    on_disk = {"host_memory_bytes": divided.host_bytes, "disk": divided.budget((str(tmp_path),))}
    model = small_model(config, replace(how, device_budget=device, **on_disk))
    store, pinned = model.execution.store, []
    monkeypatch.setattr(host_pool._Slab, "__init__", noting(host_pool._Slab.__init__, pinned))
    for _ in range(3):
        model(*small_inputs(config, BATCH)).backward()
        pinned.append("end of step")
    assert pinned[-2:] == ["end of step"] * 2, "no memory is pinned after the first steps"
    assert store.pool.allocated_bytes <= divided.host_bytes
    assert store.disk_tier.peak_used_bytes == pytest.approx(divided.disk_bytes, abs=2 * shape.residual_bytes, rel=0.02)


def noting(function, calls):
    """Wrap a function so that its calls are counted."""
    return lambda *arguments: (calls.append(arguments), function(*arguments))[1]


@pytest.mark.parametrize(
    "num_layers, interval, recompute",
    [
        (1, 1, Recompute.KV),
        (3, 2, Recompute.ALL),
        (5, 3, Recompute.KV),
        (4, 1, Recompute.NONE),
        (7, 4, Recompute.ATTENTION),
    ],
)
@pytest.mark.parametrize("device_share", [0.0, 0.1, 0.37, 0.5, 0.82, 0.9, 0.98, 1.0, 1.3])
@pytest.mark.parametrize("limits", [{}, {"window": 5}, {"window": 20}, {"local_block": 16}], ids=str)
def test_a_step_fits_a_budget_of_host_and_device_memory(num_layers, interval, recompute, device_share, limits):
    """A window leaves fewer gradients to store, and needs no more of anything."""
    config = small_config(LENGTH, num_layers=num_layers)
    shape = shape_of(config)
    needed = shape.tier_bytes(interval, recompute)
    device = int(device_share * needed)
    host = shape.host_bytes(device, interval, recompute)
    how = replace(
        OFFLOADED,
        checkpoint_interval=interval,
        recompute=recompute,
        device_budget=shape.device_budget(device, interval, recompute),
    )
    model = small_model(config, replace(how, host_memory_bytes=host, slice_length=SLICE_LENGTH))
    for layer in model.layers[::2]:
        layer.self_attention.variant = replace(layer.self_attention.variant, **limits)
    model(*small_inputs(config, BATCH)).backward()


@RECOMPUTE
@pytest.mark.parametrize("num_layers, interval", [(2, 2), (5, 3), (7, 4), (13, 6), (32, 4)])
def test_no_share_of_the_device_leaves_more_on_the_host_than_estimated(num_layers, interval, recompute):
    shape = replace(SHAPE, num_layers=num_layers)
    for percent in range(0, 101, 4):
        device = shape.tier_bytes(interval, recompute) * percent // 100
        placed = place(shape, recompute, interval, device)
        assert placed.host_bytes <= shape.host_bytes(device, interval, recompute)


@RECOMPUTE
def test_device_memory_is_given_first_to_what_is_copied_most_often(recompute):
    kinds = SHAPE.kind_bytes(1, recompute)
    assert list(kinds) == sorted(kinds)
    enough = 0
    for kind, needed in kinds.items():
        enough += needed
        stored = SHAPE.device_bytes(enough, 1, recompute)
        if kind < ChunkKind.HIDDEN_GRADIENTS:
            assert [stored[each] for each in kinds] == [n if each <= kind else 0 for each, n in kinds.items()]
    everything = SHAPE.tier_bytes(1, recompute) + SHAPE.residual_bytes
    assert SHAPE.device_bytes(everything, 1, recompute) == kinds
    assert SHAPE.host_bytes(everything, 1, recompute) == 0
    assert SHAPE.host_bytes(0, 1, recompute) == SHAPE.tier_bytes(1, recompute)


def test_llama_3_8b_at_a_million_tokens_on_four_gpus():
    """Per token and layer: x and o 8192 bytes each, lse 128, K and V 4096; dK and dV of one layer 8192.

    Of the 8 chunks, K and V of the last are not stored, nor dK and dV of the last two.
    """
    tokens = 2**18
    keys_and_values, gradients = 4096 * 7 // 8, 8192 * 6 // 8
    assert SHAPE.residual_bytes == 8192 * tokens
    assert SHAPE.saved_bytes(Recompute.ALL) == (8192 + 128 + keys_and_values) * tokens
    assert SHAPE.saved_bytes(Recompute.KV) == (8192 + 128) * tokens
    assert SHAPE.tier_bytes(1) == tokens * (32 * (8192 + 128 + keys_and_values) + 34 * 8192 + gradients)
    assert SHAPE.tier_bytes(1, Recompute.KV) == tokens * (32 * (8192 + 128) + keys_and_values + 34 * 8192 + gradients)
    of_the_block = keys_and_values + gradients + 2 * 8192
    # The inputs of 6 chains, and of the highest 2 blocks of one of 5 blocks, which has 5 attention outputs.
    bytes_per_token = (6 + 2) * 8192 + 5 * (8192 + 128) + of_the_block
    assert SHAPE.tier_bytes(5, Recompute.ATTENTION) == tokens * bytes_per_token
    assert lowest_memory(SHAPE) == (Recompute.ATTENTION, 5)
    assert bytes_per_token + keys_and_values // 7 + gradients // 3 == 135_808  # of however many chunks


def test_products_of_llama_3_8b():
    """Per token and layer: 12288 bytes before attention; after it 8192 and 57344, but for 8192 tokens of 32768."""
    tokens = 2**18
    assert SHAPE.product_bytes(Recompute.ALL) == 0
    assert SHAPE.product_bytes(Recompute.MLP) == tokens * (12288 + 8192 * 3 // 4)
    assert SHAPE.product_bytes(Recompute.NONE) == tokens * (12288 + (8192 + 57344) * 3 // 4)


def _enough_for(recompute):
    """Saved products and everything else together may use up to three quarters of the budget."""
    return -(-SHAPE.tier_bytes(1, recompute) * 4 // 3)


@pytest.mark.parametrize(
    "budget, expected",
    [
        (10**13, (Recompute.NONE, 1)),
        (_enough_for(Recompute.NONE), (Recompute.NONE, 1)),
        (_enough_for(Recompute.NONE) - 1, (Recompute.MLP, 1)),
        (_enough_for(Recompute.MLP) - 1, (Recompute.ALL, 1)),
        (SHAPE.tier_bytes(1), (Recompute.ALL, 1)),
        (SHAPE.tier_bytes(1) - 1, (Recompute.KV, 1)),
        (SHAPE.tier_bytes(1, Recompute.KV) - 1, (Recompute.KV, 2)),
        (SHAPE.tier_bytes(6, Recompute.KV), (Recompute.KV, 6)),
        (SHAPE.tier_bytes(6, Recompute.KV) - 1, (Recompute.ATTENTION, 1)),
        (SHAPE.tier_bytes(1, Recompute.ATTENTION) - 1, (Recompute.ATTENTION, 2)),
    ],
)
def test_the_fastest_choice_that_fits_is_taken(budget, expected):
    assert choose_saved_activations(SHAPE, TierBudget(budget)) == expected


def test_what_is_asked_for_stays_as_it_is():
    assert choose_saved_activations(SHAPE, TierBudget(10**13), recompute=Recompute.MLP) == (Recompute.MLP, 1)
    assert choose_saved_activations(SHAPE, TierBudget(SHAPE.tier_bytes(2, Recompute.MLP)), recompute=Recompute.MLP) == (
        Recompute.MLP,
        2,
    )
    assert choose_saved_activations(SHAPE, TierBudget(10**13), interval=1) == (Recompute.NONE, 1)
    assert choose_saved_activations(SHAPE, TierBudget(10**13), interval=3) == (Recompute.ALL, 3)
    assert choose_saved_activations(SHAPE, TierBudget(SHAPE.tier_bytes(3) - 1), interval=3) == (Recompute.KV, 3)
    assert choose_saved_activations(SHAPE, TierBudget(0), Recompute.NONE, 3) == (Recompute.NONE, 3)


def test_if_nothing_fits_the_choice_is_the_lowest_memory():
    recompute, interval = choose_saved_activations(SHAPE, TierBudget(0))
    assert (recompute, interval) == lowest_memory(SHAPE)
    assert recompute == Recompute.ATTENTION
    assert least_bytes(SHAPE) == min(SHAPE.tier_bytes(k, each) for k in range(1, 33) for each in Recompute)
    assert least_bytes(SHAPE) < 0.21 * SHAPE.tier_bytes(1)


@pytest.mark.parametrize(
    "length, expected",
    [
        (2**14, Recompute.ALL),
        (2**16, Recompute.MLP),
        (2**17, Recompute.MLP),
        (2**18, Recompute.NONE),
        (2**21, Recompute.NONE),
    ],
)
def test_short_sequences_save_only_what_is_copied_behind_compute(length, expected):
    shape = replace(SHAPE, layout=SequenceLayout(length, min(length, 2**15)))
    assert choose_saved_activations(shape, TierBudget(10**15)) == (expected, 1)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_the_longest_sequence_fits_and_a_longer_one_does_not(share):
    budget = int(share * least_bytes(SHAPE))
    longest = longest_sequence(SHAPE, TierBudget(budget))

    def least(num_tokens):
        return least_bytes(replace(SHAPE, layout=SequenceLayout(num_tokens, min(2**17, num_tokens), 4)))

    assert least(longest) <= budget < least(longest + 4)


def test_no_sequence_fits_into_nothing():
    assert longest_sequence(SHAPE, TierBudget(1000)) == 0


def test_fewer_key_value_heads_than_ranks_are_replicated():
    assert (
        replace(SHAPE, num_key_value_heads=1).key_value_elements
        == replace(SHAPE, num_key_value_heads=4).key_value_elements
    )
