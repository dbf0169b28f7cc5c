"""Sequences of changing length: each has the loss and gradients of its length alone, and reuses what is allocated."""

from dataclasses import replace
from math import inf

import pytest
import torch

from megatron.config import Recompute
from megatron.fpdt.device_budget import NO_DEVICE_MEMORY, DeviceBudget
from megatron.fpdt.host_pool import HostPool
from megatron.fpdt.stream import Saving
from tests.unit.model.small_model import OFFLOADED, loss_and_gradients, small_config, small_inputs, small_model

LENGTHS = (72, 16, 40, 8, 64)
SAVINGS = {
    72: Saving(Recompute.KV, 2, NO_DEVICE_MEMORY),
    40: Saving(Recompute.NONE, 1, DeviceBudget(30_000)),
    16: Saving(Recompute.NONE, 1, DeviceBudget(10**9)),
}


def small(length):
    return small_config(max_position_embeddings=72, seq_length=length)


@pytest.mark.parametrize("by_length", [{}, SAVINGS], ids=["the same", "chosen per length"])
@pytest.mark.parametrize("order", [LENGTHS, LENGTHS[::-1]], ids=["longest first", "longest last"])
def test_changing_lengths_compute_what_each_does_alone_and_allocate_once(by_length, order):
    model = small_model(small(72), replace(OFFLOADED, by_length=by_length))
    pool, device = model.execution.store.pool, model.execution.store.device_tier
    alone = {}
    for length in order:
        own = small_model(small(length), replace(OFFLOADED, by_length=by_length))
        alone[length] = (*loss_and_gradients(own, small_inputs(small(length))), own.execution.store.copied)
    for length in order:
        loss_and_gradients(model, small_inputs(small(length)))
    allocated = pool.allocated_bytes, pool.num_slabs
    for length in (*order, *order[::2], *order[::-1]):
        copied = replace(model.execution.store.copied)
        loss, gradients = loss_and_gradients(model, small_inputs(small(length)))
        expected_loss, expected, counts = alone[length]
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        assert model.execution.store.copied.bytes_out - copied.bytes_out == counts.bytes_out
        assert model.execution.store.copied.bytes_in - copied.bytes_in == counts.bytes_in
        assert (pool.used_bytes, device.used_bytes) == (0, 0)
        assert (pool.allocated_bytes, pool.num_slabs) == allocated


def test_shorter_sequences_need_no_memory_but_that_of_the_longest():
    model = small_model(small(72), OFFLOADED)
    pool = model.execution.store.pool
    loss_and_gradients(model, small_inputs(small(72)))
    allocated = pool.allocated_bytes
    for length in (64, 40, 32, 16, 8):
        loss_and_gradients(model, small_inputs(small(length)))
    assert pool.allocated_bytes == allocated


@pytest.mark.parametrize("recompute", [Recompute.ATTENTION, Recompute.NONE])
@pytest.mark.parametrize("shorter", [8, 19, 64])
def test_lengths_in_any_order_fit_the_memory_that_the_longest_needs(recompute, shorter):
    how = replace(OFFLOADED, recompute=recompute)
    needed = {}
    for length in (shorter, 72):
        alone = small_model(small(length), how)
        loss_and_gradients(alone, small_inputs(small(length)))
        needed[length] = alone.execution.store.pool.peak_used_bytes
    by_length = {shorter: Saving(recompute, 1, NO_DEVICE_MEMORY, needed[shorter])}
    model = small_model(small(72), replace(how, host_memory_bytes=needed[72], by_length=by_length))
    for length in (shorter, 72, shorter, 72):
        loss_and_gradients(model, small_inputs(small(length)))
    assert model.execution.store.pool.allocated_bytes == needed[72]


def test_what_tensors_leave_unused_of_slabs_is_at_most_what_the_budget_spares():
    pool = HostPool(pinned=False, budget_bytes=1000)
    pool.begin_sequence(2, 1000)
    addresses = [tensor.data_ptr() for tensor in [pool.empty((size,), torch.uint8) for size in (400, 300)]]
    pool.begin_sequence(1, 800)
    first = pool.empty((200,), torch.uint8)  # leaves 100 of the 200 bytes beside 800 that the budget spares
    second = pool.empty((250,), torch.uint8)
    third = pool.empty((350,), torch.uint8)
    assert [first.data_ptr(), third.data_ptr()] == addresses[::-1]
    assert second.data_ptr() not in addresses
    assert (pool.used_bytes, pool.allocated_bytes) == (800, 950)


def test_a_slab_of_another_length_holds_a_smaller_tensor_and_one_of_the_same_does_not():
    pool = HostPool(pinned=False)
    pool.begin_sequence(2, inf)
    sizes = (100, 1000, 300)
    addresses = [tensor.data_ptr() for tensor in [pool.empty((size,), torch.uint8) for size in sizes]]
    assert pool.empty((200,), torch.uint8).data_ptr() not in addresses
    allocated = pool.allocated_bytes
    pool.begin_sequence(1, inf)
    small = pool.empty((250,), torch.uint8)
    assert (small.data_ptr(), small.untyped_storage().nbytes()) == (addresses[2], 250)
    assert (pool.used_bytes, pool.allocated_bytes) == (250, allocated)
    del small
    assert pool.used_bytes == 0
