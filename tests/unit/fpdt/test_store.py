import weakref

import pytest
import torch

from megatron.fpdt.device_budget import ChunkKind, DeviceBudget
from megatron.fpdt.host_pool import HostMemoryError
from megatron.fpdt.store import ChunkStore

CPU = torch.device("cpu")
TIERS = pytest.mark.parametrize("offloading", [False, True], ids=["device", "host"])


def numbered_chunks(store, num_chunks, length=4):
    chunks = store.empty((num_chunks * length,), torch.float32).split(length)
    for number, chunk in enumerate(chunks):
        store.put(chunk, torch.full((length,), float(number)))
    return chunks


@TIERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_was_put_is_what_arrives(offloading, dtype):
    store = ChunkStore(CPU, offloading)
    values = torch.randn(7, 2, 3).to(dtype)
    tensor = store.empty(values.shape, dtype)
    for chunk, value in zip(tensor.split([3, 3, 1]), values.split([3, 3, 1]), strict=True):
        store.put(chunk, value)
    arrived = torch.cat([chunk for (chunk,) in store.prefetch([c] for c in tensor.split([3, 3, 1]))])
    assert arrived.dtype == dtype
    assert torch.equal(arrived, values)


@TIERS
def test_a_strided_value_may_be_put(offloading):
    store = ChunkStore(CPU, offloading)
    value = torch.randn(3, 4, 5).permute(2, 0, 1)
    chunk = store.empty(value.shape, value.dtype)
    store.put(chunk, value)
    assert torch.equal(chunk, value)


@TIERS
def test_what_is_stored_does_not_change_with_the_value_it_came_from(offloading):
    store = ChunkStore(CPU, offloading)
    value = torch.ones(4)
    chunk = store.empty((4,), torch.float32)
    store.put(chunk, value)
    value.zero_()
    assert torch.equal(next(store.prefetch([[chunk]]))[0], torch.ones(4))


def test_an_arrival_from_the_host_is_a_copy_that_may_be_written_to():
    store = ChunkStore(CPU, offloading=True)
    (chunk,) = numbered_chunks(store, 1)
    (arrived,) = next(store.prefetch([[chunk]]))
    arrived.fill_(9)
    assert not store.pool.owns(arrived)
    assert torch.equal(chunk, torch.zeros(4))


def test_an_arrival_on_the_device_tier_is_the_stored_chunk_itself():
    store = ChunkStore(CPU, offloading=False)
    chunks = numbered_chunks(store, 3)
    assert all(arrived is chunk for chunk, (arrived,) in zip(chunks, store.prefetch([c] for c in chunks), strict=True))


def test_bytes_are_counted_both_ways_on_the_host_tier_and_not_at_all_on_the_device():
    host, device = ChunkStore(CPU, offloading=True), ChunkStore(CPU, offloading=False)
    for store in (host, device):
        chunks = numbered_chunks(store, 3)
        for _ in store.prefetch([chunks[i], chunks[0]] for i in range(3)):
            pass
    assert (host.copied.bytes_out, host.copied.bytes_in) == (48, 96)
    assert (device.copied.bytes_out, device.copied.bytes_in) == (0, 0)


def test_only_the_host_tier_takes_memory_of_the_pool():
    for offloading in (False, True):
        store = ChunkStore(CPU, offloading)
        tensor = store.empty((5, 3), torch.bfloat16)
        assert store.pool.owns(tensor) == offloading
        assert store.pool.used_bytes == 30 * offloading


def test_the_budget_reaches_the_pool():
    store = ChunkStore(CPU, offloading=True, host_budget_bytes=8)
    with pytest.raises(HostMemoryError):
        store.empty((9,), torch.uint8)


@TIERS
def test_groups_arrive_in_order_and_keep_their_order_inside(offloading):
    store = ChunkStore(CPU, offloading)
    chunks = numbered_chunks(store, 4)
    groups = [[0, 2], [], [3, 1, 0], [2]]
    arrived = [[t[0].item() for t in group] for group in store.prefetch([chunks[i] for i in g] for g in groups)]
    assert arrived == groups


def test_one_group_is_prefetched_and_not_more():
    store = ChunkStore(CPU, offloading=True)
    chunks = numbered_chunks(store, 5)
    asked = []

    def groups():
        for number, chunk in enumerate(chunks):
            asked.append(number)
            yield [chunk]

    ahead = store.prefetch(groups())
    assert asked == []
    ahead.start()
    assert asked == [0]
    ahead.start()
    assert asked == [0], "a group that is being prefetched is not prefetched twice"
    for number in range(5):
        assert next(ahead)[0][0] == number
        assert asked == list(range(min(number + 2, 5)))


def test_the_next_group_is_prefetched_before_the_current_one_is_returned():
    store = ChunkStore(CPU, offloading=True)
    chunks = numbered_chunks(store, 2)
    ahead = store.prefetch([c] for c in chunks)
    next(ahead)
    chunks[1].fill_(-1)
    assert torch.equal(next(ahead)[0], torch.ones(4))


@TIERS
def test_an_exhausted_prefetch_stays_exhausted(offloading):
    store = ChunkStore(CPU, offloading)
    ahead = store.prefetch([[numbered_chunks(store, 1)[0]]])
    next(ahead)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(ahead)
    with pytest.raises(StopIteration):
        next(store.prefetch([]))


def test_a_prefetch_holds_no_group_that_it_has_returned():
    store = ChunkStore(CPU, offloading=True)
    ahead = store.prefetch([c] for c in numbered_chunks(store, 3))
    (arrived,) = next(ahead)
    gone = weakref.ref(arrived)
    del arrived
    assert gone() is None


def test_an_expected_chunk_is_copied_once_for_any_later_prefetch():
    store = ChunkStore(CPU, offloading=True)
    chunks = numbered_chunks(store, 3)
    store.expect([chunks[1]])
    assert store.copied.bytes_in == chunks[1].nbytes
    assert [chunk[0].item() for (chunk,) in store.prefetch([c] for c in chunks)] == [0, 1, 2]
    assert store.copied.bytes_in == 3 * chunks[1].nbytes


def test_a_chunk_expected_again_is_not_copied_again():
    store = ChunkStore(CPU, offloading=True)
    chunks = numbered_chunks(store, 3)
    store.expect(chunks[:2])
    store.expect(chunks)
    assert store.copied.bytes_in == 3 * chunks[0].nbytes
    assert [chunk[0].item() for (chunk,) in store.prefetch([c] for c in chunks)] == [0, 1, 2]


def test_putting_a_chunk_again_drops_its_expected_copy():
    store = ChunkStore(CPU, offloading=True)
    chunks = numbered_chunks(store, 2)
    store.expect(chunks)
    store.put(chunks[1], torch.full_like(chunks[1], 7.0))
    assert [chunk[0].item() for (chunk,) in store.prefetch([c] for c in chunks)] == [0, 7]


def test_an_unused_expected_copy_is_released_when_another_is_expected():
    store = ChunkStore(CPU, offloading=True)
    first, second = numbered_chunks(store, 2)
    store.expect([first])
    (arriving, _), *_ = store._expected.values()
    gone = weakref.ref(arriving)
    del arriving, _
    store.expect([second])
    assert gone() is None


@TIERS
def test_without_ahead_a_group_is_prefetched_only_when_start_is_called(offloading):
    store = ChunkStore(CPU, offloading)
    chunks = numbered_chunks(store, 3)
    groups = store.prefetch(([c] for c in chunks), ahead=False)
    sent = lambda: store.copied.bytes_in // chunks[0].nbytes  # noqa: E731
    (first,) = next(groups)
    assert sent() == (1 if offloading else 0)
    groups.start()
    groups.start()
    assert sent() == (2 if offloading else 0)
    assert [first[0].item(), *(chunk[0].item() for (chunk,) in groups)] == [0, 1, 2]


def test_tensors_are_stored_on_the_device_within_the_budget_and_release_their_share():
    store = ChunkStore(CPU, offloading=True, device_budget=DeviceBudget(100))
    first, second, third = (store.empty((size,), torch.uint8) for size in (60, 60, 40))
    assert (store.device_tier.used_bytes, store.pool.used_bytes) == (100, 60)
    assert [store.pool.owns(t) for t in (first, second, third)] == [False, True, False]
    chunk = first[:10]
    del first
    assert store.device_tier.used_bytes == 100, "a chunk still holds it"
    del chunk
    assert store.device_tier.used_bytes == 40
    assert not store.pool.owns(store.empty((60,), torch.uint8))


def test_device_memory_is_reserved_for_kinds_that_gain_more():
    budget = DeviceBudget(100, {ChunkKind.KEY_VALUE_GRADIENTS: 30, ChunkKind.KEYS_VALUES: 40})
    store = ChunkStore(CPU, offloading=True, device_budget=budget)

    def on_device(num_bytes, kind):
        tensors.append(store.empty((num_bytes,), torch.uint8, kind))
        return store.is_on_device(tensors[-1])

    tensors = []
    assert not on_device(31, ChunkKind.HIDDEN_STATES)
    assert on_device(30, ChunkKind.HIDDEN_STATES)
    assert on_device(40, ChunkKind.KEYS_VALUES)
    assert not on_device(1, ChunkKind.KEYS_VALUES)
    assert on_device(30, ChunkKind.KEY_VALUE_GRADIENTS)
    tensors.clear()
    assert store.device_tier.used_bytes == 0


def test_only_what_travels_is_counted():
    store = ChunkStore(CPU, offloading=True, device_budget=DeviceBudget(8))
    resident, offloaded = (store.empty((8,), torch.uint8) for _ in range(2))
    for chunk in (resident, offloaded):
        store.put(chunk, torch.ones(8, dtype=torch.uint8))
    list(store.prefetch([[resident], [offloaded]]))
    assert (store.copied.bytes_in, store.copied.bytes_out) == (8, 8)


def test_an_expected_copy_is_dropped_with_its_tensor():
    """The next tensor of its size has its address."""
    store = ChunkStore(CPU, offloading=True)
    chunks = numbered_chunks(store, 2)
    address = chunks[1].data_ptr()
    store.expect([chunks[1]])
    del chunks
    again = store.empty((8,), torch.float32).split(4)
    assert again[1].data_ptr() == address
    again[1].fill_(9.0)
    assert [chunk[0].item() for (chunk,) in store.prefetch([[again[1]]])] == [9]


def test_a_value_saved_on_the_host_does_not_change_with_its_source_and_is_counted():
    store = ChunkStore(CPU, offloading=True)
    value = torch.ones(4)
    chunk = store.save(value)
    store.release_sent()
    value.zero_()
    assert store.pool.owns(chunk)
    assert torch.equal(chunk, torch.ones(4))
    assert (store.copied.bytes_out, store.pool.used_bytes) == (16, 16)


def test_a_value_saved_on_the_device_is_the_value_itself_within_the_budget():
    value = torch.ones(4)
    assert ChunkStore(CPU, offloading=False).save(value) is value
    store = ChunkStore(CPU, offloading=True, device_budget=DeviceBudget(16))
    assert store.save(value) is value
    assert store.device_tier.used_bytes == 16
    assert store.pool.owns(store.save(torch.ones(1)))
    del value
    assert store.device_tier.used_bytes == 0


def test_an_added_value_is_stored_as_it_is_on_the_device_and_copied_to_the_host():
    store = ChunkStore(CPU, offloading=True, device_budget=DeviceBudget(16))
    first, second = torch.ones(4), torch.full((4,), 2.0)
    chunks = [store.add(value, ChunkKind.KEYS_VALUES) for value in (first, second)]
    assert chunks[0] is first
    assert store.pool.owns(chunks[1])
    assert [chunk[0].item() for (chunk,) in store.prefetch([c] for c in chunks)] == [1, 2]
    assert (store.device_tier.used_bytes, store.copied.bytes_out) == (16, 16)


@pytest.mark.parametrize("part", [lambda t: t[:2], lambda t: t.T], ids=["a part", "strided"])
def test_an_added_view_holds_no_memory_but_its_own(part):
    whole = torch.arange(12.0).view(4, 3)
    chunk = ChunkStore(CPU, offloading=False).add(part(whole), ChunkKind.KEYS_VALUES)
    assert torch.equal(chunk, part(whole))
    assert chunk.is_contiguous()
    assert chunk.untyped_storage().nbytes() == chunk.nbytes
    assert chunk.data_ptr() != whole.data_ptr()


def test_a_tensor_can_be_allocated_on_either_tier_for_any_budget():
    store = ChunkStore(CPU, offloading=True, device_budget=DeviceBudget(16))
    on_host = store.empty((2,), torch.float32, on_device=False)
    on_device = store.empty((64,), torch.float32, on_device=True)
    assert store.pool.owns(on_host)
    assert store.is_on_device(on_device)
    assert store.device_tier.used_bytes == 256
