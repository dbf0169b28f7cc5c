"""Chunks on disk: what is written is what arrives, in any order of reads and writes, and what fails says so."""

import errno
import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron.fpdt import disk_files
from megatron.fpdt.address_space import ALIGNMENT, AddressSpace
from megatron.fpdt.device_budget import ChunkKind
from megatron.fpdt.disk_budget import DiskBudget, HostShare
from megatron.fpdt.disk_files import STRIPE_BYTES, DiskError, DiskFiles, check_folder, file_system_of
from megatron.fpdt.stalls import Stalls
from megatron.fpdt.store import ChunkStore

CPU = torch.device("cpu")
MIB = 2**20


def disk_store(folder, file_bytes=16 * MIB, staging_bytes=0, folders=1):
    """A store whose host has no room, so that every chunk is on disk."""
    names = tuple(str(folder / f"disk{number}") for number in range(folders))
    for name in names:
        Path(name).mkdir(exist_ok=True)
    return ChunkStore(CPU, offloading=True, host_budget_bytes=0, disk=DiskBudget(names, file_bytes, staging_bytes))


def failing(call, code, after):
    """A read or write that works `after` times, and then fails."""
    count, lock = [0], threading.Lock()

    def fail(*arguments):
        with lock:
            count[0] += 1
            if count[0] > after:
                raise OSError(code, os.strerror(code))
        return call(*arguments)

    return fail


@pytest.mark.parametrize("folders", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_was_put_is_what_arrives(tmp_path, dtype, folders):
    """Chunks of any size: within a stripe, over several, and no multiple of a sector."""
    store = disk_store(tmp_path, 64 * MIB, folders=folders)
    lengths = [1, 4096, 3_000_001, STRIPE_BYTES // dtype.itemsize, 2_500_000]
    value = torch.arange(sum(lengths), dtype=torch.float64).to(dtype)
    tensor = store.empty(value.shape, dtype)
    for chunk, part in zip(tensor.split(lengths), value.split(lengths), strict=True):
        store.put(chunk, part)
    arrived = torch.cat([chunk for (chunk,) in store.prefetch([chunk] for chunk in tensor.split(lengths))])
    assert torch.equal(arrived, value)
    assert store.disk_tier.copied.bytes_out == store.disk_tier.copied.bytes_in == value.nbytes
    assert store.pool.used_bytes == 0


def test_random_puts_reads_announcements_and_releases_give_what_was_put_last(tmp_path, monkeypatch):
    """With slow reads and writes, and little staging memory."""
    for name in ("preadv", "pwritev"):
        call = getattr(os, name)
        slow = lambda *arguments, call=call: (time.sleep(random.random() / 500), call(*arguments))[1]  # noqa: E731
        monkeypatch.setattr(disk_files.os, name, slow)
    store, choose = disk_store(tmp_path, 4 * MIB), random.Random(3)
    stored = {}
    for step in range(400):
        match choose.choice(["new", "put", "read", "read", "announce", "keep", "release"]):
            case "new":
                length = choose.choice([10, 5_000, 100_000])
                if store.disk_tier.has_room(4 * length, ChunkKind.PRODUCTS):
                    stored[step] = (store.add(torch.full((length,), float(step)), ChunkKind.PRODUCTS), step)
            case "put" if stored:
                key = choose.choice([*stored])
                chunk, _ = stored[key]
                store.put(chunk, torch.full(chunk.shape, float(step)))
                stored[key] = (chunk, step)
            case "read" if stored:
                chunk, number = choose.choice([*stored.values()])
                ((arrived,),) = store.prefetch([[chunk]])
                assert (arrived == number).all()
            case "announce" if stored:
                store.read_ahead([choose.choice([*stored.values()])[0] for _ in range(5)])
            case "keep" if stored:
                store.keep_ahead([choose.choice([*stored.values()])[0] for _ in range(5)])
            case "release" if stored:
                del stored[choose.choice([*stored])]
    stored.clear()
    store.read_ahead([])
    chunk = arrived = None
    assert store.disk_tier.used_bytes == 0
    deadline = time.monotonic() + 60
    while store.disk_tier.staging.num_free < store.disk_tier.staging.num_pieces and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.disk_tier.staging.num_free == store.disk_tier.staging.num_pieces


def test_announced_chunks_are_read_once_and_kept_until_their_last_copy(tmp_path):
    store = disk_store(tmp_path)
    chunks = [store.add(torch.full((1000,), float(number)), ChunkKind.PRODUCTS) for number in range(3)]
    store.read_ahead([*chunks, *chunks])
    for _ in range(2):
        assert [float(chunk[0]) for (chunk,) in store.prefetch([each] for each in chunks)] == [0, 1, 2]
    assert store.disk_tier.copied.bytes_in == 3 * 4000


def test_chunks_to_keep_are_written_and_not_read(tmp_path):
    store = disk_store(tmp_path)
    tensor = store.empty((3, 1000), torch.float32)
    for _ in range(2):
        store.keep_ahead(tensor)
        for number, chunk in enumerate(tensor):
            store.put(chunk, torch.full((1000,), float(number)))
        store.read_ahead(tensor[:2])
        assert [float(chunk[0]) for (chunk,) in store.prefetch([each] for each in tensor[:2])] == [0, 1]
    assert (store.disk_tier.copied.bytes_in, store.disk_tier.copied.bytes_out) == (0, 2 * 3 * 4000)
    assert [float(chunk[0]) for (chunk,) in store.prefetch([each] for each in tensor)] == [0, 1, 2]
    assert store.disk_tier.copied.bytes_in == 3 * 4000


def test_the_host_keeps_room_for_what_is_copied_most_and_its_share_of_the_rest():
    share = HostShare(100, DiskBudget((), 0, 0, disk_share=0.5, reserved_bytes={ChunkKind.KEYS_VALUES: 40}))
    assert share.host_has_room(60, ChunkKind.ATTENTION_OUTPUTS)
    assert not share.host_has_room(61, ChunkKind.ATTENTION_OUTPUTS)
    share.add_on_host(20, ChunkKind.ATTENTION_OUTPUTS)
    assert not share.host_has_room(10, ChunkKind.HIDDEN_STATES)  # the disk has nothing yet
    share.add_on_disk(20, ChunkKind.HIDDEN_STATES)
    assert share.host_has_room(10, ChunkKind.HIDDEN_STATES)
    assert share.host_has_room(80, ChunkKind.KEYS_VALUES)


def test_addresses_are_aligned_and_free_when_nothing_references_them():
    space = AddressSpace(4 * ALIGNMENT)
    first, second = space.empty((ALIGNMENT + 1,), torch.uint8), space.empty((3, 4), torch.float32)
    assert [space.place_of(tensor) for tensor in (first, second, second[1])] == [0, 2 * ALIGNMENT, 2 * ALIGNMENT + 16]
    assert not space.has_room(ALIGNMENT + 1)
    part = first[5:].view(torch.int8)
    del first
    assert space.owns(part)
    assert not space.owns(torch.empty(1))
    del part
    assert space.place_of(space.empty((2, ALIGNMENT), torch.uint8)) == 0
    with pytest.raises(MemoryError):
        space.empty((4 * ALIGNMENT,), torch.uint8)


@pytest.mark.parametrize("call, doing", [("preadv", "reading"), ("pwritev", "writing")])
def test_a_disk_that_fails_is_one_error_with_folder_reason_and_remedy(tmp_path, monkeypatch, call, doing):
    code = {"preadv": errno.EIO, "pwritev": errno.ENOSPC}[call]
    monkeypatch.setattr(disk_files.os, call, failing(getattr(os, call), code, after=3))
    store = disk_store(tmp_path)

    def write_and_read():
        for _ in range(20):
            chunk = store.add(torch.ones(1000), ChunkKind.PRODUCTS)
            next(store.prefetch([[chunk]]))

    with pytest.raises(DiskError, match=f"disk0.*{doing}.*{errno.errorcode[code]}.*; (free space|the disk fails)"):
        write_and_read()
    assert store.disk_tier.staging.num_free >= store.disk_tier.staging.num_pieces - 1, "no piece of memory is lost"


def test_only_waiting_for_the_disk_counts_as_stalled(tmp_path, monkeypatch):
    store = disk_store(tmp_path)
    first, second = (store.add(torch.ones(1000), ChunkKind.PRODUCTS) for _ in range(2))
    read = os.preadv
    monkeypatch.setattr(disk_files.os, "preadv", lambda *arguments: (time.sleep(0.05), read(*arguments))[1])
    store.read_ahead([first, second])
    time.sleep(0.3)
    next(store.prefetch([[first]]))
    assert store.disk_tier.stalled_seconds < 0.05
    next(store.prefetch([[second], [first]]))
    next(store.prefetch([[first]]))
    assert store.disk_tier.stalled_seconds >= 0.05


def test_a_wait_that_fails_is_counted_and_raises():
    stalls = Stalls(CPU)
    with pytest.raises(ZeroDivisionError):
        stalls.during(lambda: time.sleep(0.01) or 1 / 0)
    assert stalls.seconds >= 0.01


def test_a_failed_write_is_raised_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_files.os, "pwritev", failing(os.pwritev, errno.EIO, after=0))
    store = disk_store(tmp_path)
    chunk = store.add(torch.ones(1000), ChunkKind.PRODUCTS)
    store.disk_tier._writing[chunk.data_ptr()][0].exception()  # waits for it
    with pytest.raises(DiskError, match="EIO"):
        store.add(torch.ones(10), ChunkKind.PRODUCTS)


def test_a_folder_that_cannot_store_chunks_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name, reason in (("file", "is not a folder"), ("missing", "does not exist")):
        with pytest.raises(DiskError, match=f"{name}.*{reason}; name"):
            check_folder(str(tmp_path / name))
    assert file_system_of(Path("/proc")) == "proc"
    monkeypatch.setattr(disk_files, "file_system_of", lambda _: "tmpfs")
    with pytest.raises(DiskError, match="is on tmpfs, which is host memory"):
        check_folder(str(tmp_path))
    monkeypatch.setattr(disk_files.os, "access", lambda *_: False)
    with pytest.raises(DiskError, match="cannot be written by this user"):
        check_folder(str(tmp_path))


def test_too_little_space_is_found_at_the_start_and_gives_the_space_back(tmp_path):
    free = os.statvfs(tmp_path).f_bavail
    with pytest.raises(DiskError, match=r"reserving .* failed with (ENOSPC|EFBIG).*; "):
        DiskFiles([str(tmp_path)], 2**44)
    gc.collect()
    assert os.statvfs(tmp_path).f_bavail > free // 2


def test_files_have_no_name_are_private_and_end_with_their_owner(tmp_path):
    first, second = (DiskFiles([str(tmp_path)], 2 * STRIPE_BYTES) for _ in range(2))
    assert os.listdir(tmp_path) == []
    assert {os.fstat(files._files[0][1]).st_mode & 0o777 for files in (first, second)} == {0o600}
    for files, byte in ((first, 1), (second, 2)):
        files.write(STRIPE_BYTES, memoryview(bytearray([byte] * 100)))
    read = memoryview(bytearray(100))
    first.read(STRIPE_BYTES, read)
    assert set(read) == {1}, "two runs in one folder do not meet"
    descriptor = first._files[0][1]
    del first
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("missing", ["O_DIRECT", "O_TMPFILE", "fallocate"])
def test_a_file_system_that_lacks_a_feature_is_used_without_it(tmp_path, monkeypatch, missing):
    real = os.open

    def without(path, flags, *mode, **others):
        if missing != "fallocate" and flags & getattr(os, missing) == getattr(os, missing):
            raise OSError(errno.EINVAL, "not supported")
        return real(path, flags, *mode, **others)

    monkeypatch.setattr(disk_files.os, "open", without)
    if missing == "fallocate":
        monkeypatch.setattr(disk_files, "_allocate", lambda *_: errno.EOPNOTSUPP)
    store = disk_store(tmp_path)
    warned = {"O_DIRECT": ["does not support O_DIRECT"], "O_TMPFILE": [], "fallocate": ["cannot reserve space"]}
    assert len(store.disk_tier.files.warnings) == len(warned[missing])
    assert all(text in line for text, line in zip(warned[missing], store.disk_tier.files.warnings, strict=True))
    chunk = store.add(torch.ones(100_000), ChunkKind.PRODUCTS)
    ((arrived,),) = store.prefetch([[chunk]])
    assert arrived.all()
    assert os.listdir(tmp_path / "disk0") == []
