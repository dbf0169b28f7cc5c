"""The replayed placement of a step's chunks, against a step that runs."""

from dataclasses import replace
from itertools import product

import pytest

from megatron.config import Recompute
from megatron.core.sequence_layout import SequenceLayout
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.placement import place
from megatron.fpdt.tiers import DeviceTier
from tests.unit.fpdt.test_memory_model import BATCH, LENGTH, SLICE_LENGTH, shape_of
from tests.unit.model.small_model import OFFLOADED, small_config, small_inputs, small_model

CHUNKS = len(SequenceLayout(LENGTH, OFFLOADED.chunk_size).chunk_lengths)


@pytest.mark.parametrize("device_share", [0.0, 0.3, 0.5, 0.9, 1.0, 1.4, 2.0])
@pytest.mark.parametrize(
    "num_layers, interval, recompute",
    [*product([1, 5], [1, 2], Recompute), (13, 6, Recompute.KV), (8, 7, Recompute.ALL), (9, 4, Recompute.ATTENTION)],
)
def test_a_step_stores_its_chunks_where_the_replay_does(monkeypatch, num_layers, interval, recompute, device_share):
    used, first_products = list[int](), list[int]()
    adopt = DeviceTier.adopt

    def noting(tier, tensor, kind):
        chunk = adopt(tier, tensor, kind)
        used.append(tier.used_bytes)
        first_products.append(tensor.nbytes if kind == ChunkKind.FIRST_PRODUCTS else 0)
        return chunk

    monkeypatch.setattr(DeviceTier, "adopt", noting)
    config = small_config(LENGTH, num_layers=num_layers)
    shape = shape_of(config)
    budget = int(device_share * shape.tier_bytes(interval, recompute))
    how = replace(OFFLOADED, checkpoint_interval=interval, recompute=recompute, slice_length=SLICE_LENGTH)
    device_budget = shape.device_budget(budget, interval, recompute)
    model = small_model(config, replace(how, device_budget=device_budget))
    loss = model(*small_inputs(config, BATCH))
    forward, host = max(used, default=0), model.execution.store.pool
    used.clear()
    loss.backward()
    placed = place(shape, recompute, interval, budget)
    # One of the products, which the replay divides, may not fit the rest of the budget.
    slack = shape.product_bytes(recompute) / CHUNKS
    assert max(placed.forward_device_bytes, placed.loss_device_bytes) == pytest.approx(forward, abs=2 * slack + 1)
    # The backward pass begins with the scaling of the last block's gradient, which counts to the loss.
    backward = max(placed.loss_device_bytes, placed.backward_device_bytes)
    assert backward == pytest.approx(max(used, default=0), abs=2 * slack + 1)
    chunks = shape.first_product_chunks(recompute)
    saved = device_budget.first_slices * num_layers * sum(chunks)
    assert sum(first_products) == pytest.approx(saved, abs=max(chunks, default=0))
    assert placed.host_bytes == pytest.approx(host.peak_used_bytes, abs=2 * slack + 1)
