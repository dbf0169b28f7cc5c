import gc
import mmap
import weakref

import pytest
import torch

from megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron.fpdt import host_pool
from megatron.fpdt.host_pool import HostMemoryError, HostPool


def plain_pool(budget_bytes=None):
    return HostPool(pinned=False, budget_bytes=budget_bytes)


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (4097,), (1023, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8])
def test_a_tensor_takes_exactly_its_bytes(shape, dtype):
    pool = plain_pool()
    tensor = pool.empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert pool.allocated_bytes == pool.used_bytes == pool.peak_used_bytes == tensor.nbytes
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_slab_starts_on_a_page():
    pool = plain_pool()
    assert [pool.empty((n,), torch.uint8).data_ptr() % mmap.PAGESIZE for n in (1, 4095, 4097)] == [0, 0, 0]


def test_tensors_alive_together_do_not_overlap():
    pool = plain_pool()
    tensors = [pool.empty((1000,), torch.int64) for _ in range(20)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))


def test_a_slab_is_reused_for_any_dtype_and_shape_of_the_same_bytes():
    pool = plain_pool()
    address = pool.empty((8, 16), torch.float32).data_ptr()
    again = pool.empty((64,), torch.float64)
    assert again.data_ptr() == address
    assert (pool.num_slabs, pool.allocated_bytes, pool.used_bytes) == (1, 512, 512)


def test_counters_distinguish_allocated_used_and_peak_bytes():
    pool = plain_pool()
    first, second = pool.empty((100,), torch.uint8), pool.empty((60,), torch.uint8)
    assert (pool.num_slabs, pool.allocated_bytes, pool.used_bytes, pool.peak_used_bytes) == (2, 160, 160, 160)
    del first
    assert (pool.allocated_bytes, pool.used_bytes, pool.peak_used_bytes) == (160, 60, 160)
    third = pool.empty((100,), torch.uint8)
    assert (pool.num_slabs, pool.used_bytes, pool.peak_used_bytes) == (2, 160, 160)
    del second, third
    assert (pool.allocated_bytes, pool.used_bytes) == (160, 0)


def test_many_steps_allocate_what_the_first_did():
    pool = plain_pool()
    for _ in range(50):
        chunks = [pool.empty((n,), torch.float32) for n in (10, 10, 7)]
        assert pool.used_bytes == 108
        del chunks
    assert (pool.num_slabs, pool.allocated_bytes) == (3, 108)


@pytest.mark.parametrize(
    "view_of",
    [lambda t: t[3:5], lambda t: t.split(4)[1], lambda t: t.view(2, 8).T, lambda t: t.detach(), lambda t: t.data],
    ids=["slice", "split", "transpose", "detach", "data"],
)
def test_a_slab_stays_while_a_view_lives(view_of):
    pool = plain_pool()
    tensor = pool.empty((16,), torch.float32)
    tensor.copy_(torch.arange(16.0))
    view = view_of(tensor)
    expected = view.clone()
    del tensor
    assert pool.used_bytes == 64
    pool.empty((16,), torch.float32).fill_(-1)
    assert torch.equal(view, expected)
    del view
    assert pool.used_bytes == 0


def test_a_slab_stays_while_an_autograd_graph_needs_it():
    pool = plain_pool()
    x = pool.empty((16,), torch.float64).copy_(torch.arange(16)).requires_grad_()
    weight = torch.ones(16, dtype=torch.float64, requires_grad=True)
    y = (x.detach() * weight).sum()
    del x
    assert pool.used_bytes == 128
    y.backward()
    assert torch.equal(weight.grad, torch.arange(16, dtype=torch.float64))
    del y
    gc.collect()
    assert pool.used_bytes == 0


def test_a_tensor_outlives_the_pool_that_made_it():
    pool = plain_pool()
    tensor = pool.empty((4,), torch.float32).fill_(3)
    del pool
    gc.collect()
    assert tensor.sum() == 12


def test_a_pool_that_nobody_needs_is_freed_with_its_slabs():
    pool = plain_pool()
    pool.empty((4,), torch.float32)
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None


def test_owns_distinguishes_the_pool_s_tensors_from_others():
    """Others lie below and above: the system hands out maps from high addresses to low ones."""
    pool, other = plain_pool(), plain_pool()
    foreign = [other.empty((n,), torch.uint8) for n in (5001, 2**24)]
    mine = [pool.empty((n,), torch.uint8) for n in (1, 5000, 4096)]
    foreign += [other.empty((5000,), torch.uint8), torch.empty(5000), torch.empty(0)]
    assert all(pool.owns(t) and pool.owns(t[-1:]) and pool.owns(t.view(-1, 1)) for t in mine)
    assert not any(pool.owns(t) for t in foreign)
    assert not pool.owns(torch.empty(3, device="meta"))


def test_an_empty_tensor_takes_no_slab():
    pool = plain_pool()
    assert pool.empty((3, 0, 2), torch.float32).shape == (3, 0, 2)
    assert (pool.num_slabs, pool.used_bytes) == (0, 0)


@pytest.mark.parametrize(
    "missing, expected",
    [(2**29, r"1\.50 GiB, 536,870,912 bytes more"), (4, r"1\.00 GiB, 4 bytes more")],
)
def test_past_the_budget_the_error_says_need_budget_and_what_shrinks_it(missing, expected):
    pool = plain_pool(budget_bytes=2**30)
    kept = pool.empty((2**20,), torch.uint8)
    with pytest.raises(HostMemoryError, match=rf"needs at least {expected} than the 1\.00 GiB") as error:
        pool.empty((2**30 - 2**20 + missing,), torch.uint8)
    for flag in ("--seq-length", "--ds-sequence-parallel-size", "--micro-batch-size"):
        assert flag in str(error.value)
    assert (pool.num_slabs, pool.used_bytes, pool.allocated_bytes) == (1, kept.nbytes, kept.nbytes)


def test_flags_that_the_error_names_exist():
    assert "seq_length" in ModelConfig.__dataclass_fields__
    assert "ds_sequence_parallel_size" in ParallelConfig.__dataclass_fields__
    assert "micro_batch_size" in TrainingConfig.__dataclass_fields__


def test_the_budget_may_be_used_to_its_last_byte_and_reuse_costs_nothing():
    pool = plain_pool(budget_bytes=100)
    for _ in range(3):
        tensor = pool.empty((100,), torch.uint8)
        with pytest.raises(HostMemoryError):
            pool.empty((1,), torch.uint8)
        del tensor


def test_unused_slabs_are_freed_before_the_budget_is_exceeded():
    pool = plain_pool(budget_bytes=100)
    kept = pool.empty((20,), torch.uint8)
    pool.empty((60,), torch.uint8)
    assert (pool.num_slabs, pool.allocated_bytes, pool.used_bytes) == (2, 80, 20)
    longer = pool.empty((80,), torch.uint8)
    assert (pool.num_slabs, pool.allocated_bytes, pool.used_bytes) == (2, 100, 100)
    assert pool.owns(kept)
    assert pool.owns(longer)


def test_no_more_slabs_are_freed_than_the_budget_requires():
    pool = plain_pool(budget_bytes=100)
    both = [pool.empty((30,), torch.uint8) for _ in range(2)]
    del both
    pool.empty((50,), torch.uint8)
    assert (pool.num_slabs, pool.allocated_bytes) == (2, 80)


def test_memory_that_the_machine_refuses_is_a_clear_error():
    pool = plain_pool()
    with pytest.raises(HostMemoryError, match=r"the machine refused .* GiB of host memory .*--seq-length"):
        pool.empty((2**60,), torch.uint8)
    assert (pool.num_slabs, pool.used_bytes, pool.allocated_bytes) == (0, 0, 0)
    assert pool.empty((8,), torch.uint8).numel() == 8


class FakeCudart:
    """Remembers which addresses are registered."""

    def __init__(self, error=0):
        self.error = error
        self.registered = {}

    def cudaHostRegister(self, address, num_bytes, flags):
        if self.error == 0:
            self.registered[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address):
        del self.registered[address]


def test_a_pinned_slab_is_registered_once_and_unregistered_when_the_pool_goes(monkeypatch):
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    pool = HostPool(pinned=True)
    for _ in range(3):
        tensor = pool.empty((100_000,), torch.uint8)
        assert cudart.registered == {tensor.data_ptr(): 100_000}
        del tensor
    del pool
    gc.collect()
    assert cudart.registered == {}


def test_a_freed_slab_is_unregistered_when_no_copy_is_in_flight(monkeypatch):
    cudart, order = FakeCudart(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append(list(cudart.registered.values())))
    pool = HostPool(pinned=True, budget_bytes=100)
    pool.empty((60,), torch.uint8)
    longer = pool.empty((80,), torch.uint8)
    assert order == [[60]]
    assert cudart.registered == {longer.data_ptr(): 80}


@pytest.mark.parametrize("num_bytes", [1, 4096, 8 * 4096, 8 * 4096 + 1, 1_000_001])
def test_every_byte_of_a_slab_is_touched_once_before_it_is_pinned(monkeypatch, num_bytes):
    touched, cudart = [], FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(host_pool.ctypes, "memset", lambda address, value, count: touched.append((address, count)))
    address = HostPool(pinned=True).empty((num_bytes,), torch.uint8).data_ptr()
    for start, count in sorted(touched):
        assert start == address
        address += count
    assert sum(count for _, count in touched) == num_bytes


def test_memory_that_cuda_refuses_to_pin_is_a_clear_error_and_leaves_the_pool_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCudart(error=2))
    pool = HostPool(pinned=True)
    with pytest.raises(HostMemoryError, match=r"refused to pin .* error 2.*ulimit -l unlimited"):
        pool.empty((100,), torch.uint8)
    assert (pool.num_slabs, pool.used_bytes, pool.allocated_bytes) == (0, 0, 0)
