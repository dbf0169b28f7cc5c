"""Check and measurement of the disk that takes what the host has no room for, with all ranks at work at once."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from megatron.config import Config
from megatron.core.disk_rates import DiskRates
from megatron.fpdt.disk_files import STRIPE_BYTES, DiskFiles
from megatron.fpdt.disk_tier import THREADS_PER_FOLDER
from megatron.initialize import GIB, Context
from megatron.planner.plan import Plan
from megatron.ranks.world import local_world_size

# Of a rank: enough to see past a disk's cache, few enough to take a second or two.
STRIPES, SECONDS = 256, 1.0
HEADROOM = 0.1  # of the free space, for the other users of the disk


def with_measured_disk(config: Config, context: Context) -> Context:
    """Return the context with the rates and the free space of the disk, if there is one. Collective over all ranks.

    Raises:
        DiskError: there is no space to measure with.
    """
    folders = config.parallel.ds_sequence_parallel_fpdt_disk
    if not folders:
        return context
    context.watchdog.enter("measuring the disk")
    free = free_bytes(folders) // local_world_size()
    files = DiskFiles(folders, STRIPES * STRIPE_BYTES)
    for line in files.warnings:
        context.log.warning(line)
    together = partial(dist.all_reduce, torch.zeros(1, device=context.device))
    rates = measure_disk(files, together)
    least = torch.tensor([rates.read, rates.write, free], dtype=torch.float64, device=context.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    read, write, free = least.tolist()
    return replace(context, disk_rates=DiskRates(read, write), disk_bytes=int(free * (1 - HEADROOM)))


def disk_memory(config: Config, context: Context) -> int:
    """Return the bytes of chunks that a rank may store on disk; 0 without one."""
    asked = config.parallel.ds_sequence_parallel_fpdt_disk_memory
    if config.parallel.ds_sequence_parallel_fpdt_disk is None:
        return 0
    return context.disk_bytes if asked is None else int(asked * GIB)


def disk_warnings(plan: Plan) -> list[str]:
    """Return a line for a disk that steps wait for."""
    speed = plan.speed
    if not speed.waiting_for_disk:
        return []
    advice = "a longer --seq-length, more disks for --ds-sequence-parallel-fpdt-disk or more host memory help"
    without = replace(plan, machines=replace(plan.machines, disk_memory_gib=0.0))
    if without.fits and without.speed.step < speed.step:
        instead = f"a step then takes {without.speed.step:.1f} s instead of {speed.step:.1f}, recomputing more"
        advice = f"leave out --ds-sequence-parallel-fpdt-disk: {instead}; or give more disks or host memory"
    return [
        f"the disk is slower than compute: it gives {plan.machines.disk} per GPU, and would be hidden at "
        f"{speed.disk_gbps:.2f} GB/s; by the plan steps wait {speed.waiting_for_disk:.1f} s for it; {advice}"
    ]


def free_bytes(folders: tuple[str, ...]) -> int:
    """Return the bytes that fit in equal stripes over the folders; those of one disk share its space."""
    devices = [os.stat(folder).st_dev for folder in folders]
    spaces = [os.statvfs(folder) for folder in folders]
    shares = [space.f_bavail * space.f_frsize // devices.count(dev) for space, dev in zip(spaces, devices, strict=True)]
    return min(shares) * len(folders)


def measure_disk(
    files: DiskFiles, begin: Callable[[], object], num_stripes: int = STRIPES, seconds: float = SECONDS
) -> DiskRates:
    """Write so many stripes, or for so long, and read them; return the rates of this process.

    `begin` is called before each of the two.
    """
    begin()
    written, write = _transfer(files.write, files, num_stripes, seconds)
    begin()
    _, read = _transfer(files.read, files, written, seconds)
    return DiskRates(read, write)


def _transfer(
    call: Callable[[int, memoryview], None], files: DiskFiles, num_stripes: int, seconds: float
) -> tuple[int, float]:
    """Read or write the first stripes with as many threads as the disk tier has; return how many, and GB/s."""
    threads = THREADS_PER_FOLDER * files.num_folders
    content = os.urandom(STRIPE_BYTES)  # zeros may not reach the disk
    buffers = [mmap.mmap(-1, STRIPE_BYTES) for _ in range(threads)]
    for buffer in buffers:
        buffer[:] = content
    stripes = iter(range(num_stripes))  # of all threads: those done are the first
    started = time.perf_counter()

    def work(buffer: mmap.mmap) -> int:
        done = 0
        while time.perf_counter() - started < seconds and (stripe := next(stripes, None)) is not None:
            call(stripe * STRIPE_BYTES, memoryview(buffer))
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, buffers))
    return done, done * STRIPE_BYTES / (time.perf_counter() - started) / 1e9
