"""The planner's estimates with a disk behind the host."""

import re
from dataclasses import replace
from functools import partial

import pytest

from megatron.core.disk_rates import DiskRates
from megatron.planner.flags import flags_of, flags_to_change
from megatron.planner.hardware import GPUS, Machines
from megatron.planner.job import Job
from megatron.planner.models import named_model
from megatron.planner.plan import Plan
from megatron.planner.reach import advice, fastest_that_fits, longest, shortest_hiding_disk

NVME = DiskRates(read=5.0, write=3.0)
MACHINES = Machines(GPUS["H100"], num_gpus=4, gpus_per_node=4, host_memory_gib=200)


def plan(tokens, **machines):
    model, vocabulary = named_model("llama-8b", tokens)
    job = Job(model, vocabulary, num_gpus=4, chunk_length=131072, sequence_parallel_size=4)
    return Plan(job, replace(MACHINES, **machines), "flash-attn-4")


def test_a_disk_takes_what_the_host_has_no_room_for_and_makes_longer_contexts_fit():
    without, with_disk = plan(2**21), plan(2**21, disk_memory_gib=2000, disk=NVME)
    assert not without.fits
    assert with_disk.fits
    memory, machines = with_disk.memory, with_disk.machines
    assert memory.host <= machines.host_bytes_per_gpu
    assert 0 < memory.disk_chunks <= machines.disk_bytes_per_gpu
    needed = memory.host_chunks + memory.disk_chunks
    assert needed >= with_disk.job.shape.host_bytes(0, memory.checkpoint_interval, memory.recompute)
    assert longest(with_disk).job.model.seq_length > 4 * longest(without).job.model.seq_length
    assert plan(2**18, disk_memory_gib=2000).memory.disk_chunks == 0, "the host has room"
    assert not plan(2**21, disk_memory_gib=100).fits


def test_the_disk_that_is_advised_is_large_and_fast_enough():
    first = advice(plan(2**22))[0]
    gib, gbps = re.match(
        r"(\d+) GiB of disk per machine, hidden behind compute at (.+) GB/s: --seq-length", first
    ).groups()
    assert "--ds-sequence-parallel-fpdt-disk FOLDER " in first
    rate = (float(gbps) + 0.01) / 4
    fitting = fastest_that_fits(plan(2**22, disk_memory_gib=int(gib), disk=DiskRates(rate, rate)))
    assert fitting.speed.waiting_for_disk == 0
    assert f"{' '.join(flags_of(fitting))} fits" in first
    *_, unfitting = advice(
        plan(2**22, disk_memory_gib=100, disk=NVME),
        describe=partial(flags_to_change, plan(2**22, disk_memory_gib=100), left_open=frozenset()),
    )
    assert "-disk FOLDER" not in unfitting, "it was given"


def test_a_slow_disk_is_waited_for_and_long_contexts_hide_it():
    times = {rate: plan(2**21, disk_memory_gib=9000, disk=DiskRates(rate, rate)).speed for rate in (0.05, 0.5, 5)}
    assert times[0.05].waiting_for_disk > times[0.5].waiting_for_disk >= times[5].waiting_for_disk == 0
    assert times[0.05].step == pytest.approx(times[5].step + times[0.05].waiting_for_disk, rel=0.01)
    # A disk just fast enough by the estimate, of reads and writes together, is not waited for.
    enough = times[5].disk_gbps
    assert plan(2**21, disk_memory_gib=9000, disk=DiskRates(enough, enough)).speed.waiting_for_disk == pytest.approx(0)
    longer = plan(2**22, disk_memory_gib=9000, disk=NVME).speed.disk_gbps
    assert longer < enough, "attention grows faster than the chunks"
    with_disk = plan(2**21, disk_memory_gib=9000, disk=DiskRates(0.5, 0.5))
    shortest = shortest_hiding_disk(with_disk)
    assert shortest is not None
    assert with_disk.with_job(with_disk.job.at(shortest)).speed.waiting_for_disk == 0
