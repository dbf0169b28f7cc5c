"""The disk for chunks is measured where one is named, and takes what the host has no room for."""

import logging
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron.config import ConfigError, Recompute, validate
from megatron.core.disk_rates import DiskRates
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.disk_files import STRIPE_BYTES, DiskFiles
from megatron.initialize import Context
from megatron.launch.disk import free_bytes, measure_disk, with_measured_disk
from megatron.launch.execution import plan_execution, plan_of
from megatron.planner.hardware import GIB, GPUS
from tests.unit.launch.test_execution import VOCABULARY, config_of

DISK = "--ds-sequence-parallel-fpdt-disk"


def context_of(host_gib, disk_gib=0.0):
    return Context(
        ParallelState(), torch.device("cpu"), torch.bfloat16, logging.getLogger("test"), int(host_gib * GIB),
        disk_bytes=int(disk_gib * GIB),
    )  # fmt: skip


def choose(config, context):
    return plan_execution(config, context, VOCABULARY).execution


def test_a_disk_is_measured_and_its_free_space_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    context = context_of(1)
    assert with_measured_disk(config_of(), context) is context
    measured = with_measured_disk(config_of(DISK, f"{tmp_path},{tmp_path}"), context)
    assert min(measured.disk_rates.read, measured.disk_rates.write) > 0
    assert 0 < measured.disk_bytes < free_bytes((str(tmp_path),))
    assert free_bytes((str(tmp_path),) * 2) == pytest.approx(free_bytes((str(tmp_path),)), rel=0.1)


def test_a_slow_disk_is_measured_by_reading_what_was_written(tmp_path, monkeypatch):
    """What was not written is read without the disk."""
    written, read = [], []
    files = DiskFiles((str(tmp_path),), 64 * STRIPE_BYTES)
    monkeypatch.setattr(files, "write", lambda place, _: (time.sleep(0.02), written.append(place)))
    monkeypatch.setattr(files, "read", lambda place, _: read.append(place))
    measure_disk(files, lambda: None, num_stripes=64, seconds=0.05)
    assert sorted(read) == sorted(written)
    assert len(written) < 64


def test_the_disk_takes_what_the_host_has_no_room_for(tmp_path):
    config = config_of(DISK, f"{tmp_path}/a,{tmp_path}/b")
    on_host = choose(config, context_of(1000, 500))
    assert on_host.disk is None
    with_disk = choose(config, context_of(16, 500))
    disk = with_disk.disk
    assert disk.folders == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert disk.staging_bytes + with_disk.host_memory_bytes == int(16 * GIB * 0.97)
    assert 0 < disk.file_bytes < 500 * GIB
    assert with_disk.checkpoint_interval == 1
    limited = config_of(DISK, str(tmp_path), f"{DISK}-memory", "1")
    without_disk = choose(limited, context_of(16, 500))
    assert (with_disk.recompute, without_disk.recompute) == (Recompute.KV, Recompute.ATTENTION)
    with pytest.raises(ConfigError, match=f"give {DISK} more space"):
        choose(limited, context_of(8, 500))


@pytest.mark.parametrize("gbps", [5.0, 0.05])
def test_a_planned_run_uses_the_disk_and_warns_of_a_slow_one(monkeypatch, caplog, gbps):
    def on_h200(config, _, vocabulary, memory):
        planned = plan_of(config, 4, GPUS["H200"], memory, vocabulary)
        machines = replace(planned.machines, disk_memory_gib=2000, disk=DiskRates(gbps, gbps))
        return replace(planned, machines=machines)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("megatron.launch.execution.plan_of_run", on_h200)
    config = config_of(DISK, "/nvme", "--seq-length", "2M")
    execution, planned, *_ = plan_execution(config, context_of(60, 500), VOCABULARY)
    disk, memory = execution.disk, planned.memory
    assert (disk.folders, disk.disk_share, disk.file_bytes) == (("/nvme",), memory.disk_share, memory.disk_reserved)
    assert execution.host_memory_bytes + disk.staging_bytes == memory.host_chunks
    slow = [line for line in caplog.messages if line.startswith("the disk is slower than compute: it gives 0.05 GB/s")]
    assert len(slow) == (gbps < 1)
    assert all("; leave out --ds-sequence-parallel-fpdt-disk: a step then takes " in line for line in slow)


@pytest.mark.parametrize(
    "host_gib, flags, advice",
    [
        (8, [], f"name a folder on a local disk with {DISK}"),
        (0.5, [DISK, "/disk"], "GiB, without which .* is of no use"),
    ],
)
def test_too_little_host_memory_says_what_a_disk_would_do(host_gib, flags, advice):
    with pytest.raises(ConfigError, match=advice):
        choose(config_of(*flags), context_of(host_gib, 500))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([f"{DISK}-memory", "5"], rf"{DISK}-memory \(5\) has no effect without {DISK}; name a folder with"),
        ([DISK, "/a,,/b"], "'/a,,/b' names an empty folder; give one, or several as /disk1,/disk2"),
    ],
)
def test_flags_of_a_disk_that_cannot_be_honored_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        validate(config_of(*flags), 4, "cuda")
