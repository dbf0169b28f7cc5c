"""Start-up of a rank: process group, device, seeds and log, in a Context that is passed as a value."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.config import Config
from megatron.core.disk_rates import DiskRates
from megatron.core.host_memory import available_host_bytes
from megatron.core.link_rates import LinkRates
from megatron.core.parallel_state import ParallelState
from megatron.logging.logger import configure_logging
from megatron.ranks.same_settings import require_same_settings, settings_of
from megatron.ranks.watchdog import Watchdog
from megatron.ranks.world import World, join, local_rank, local_world_size

GIB = 2**30
SAME_SIZE = 0.95  # GPUs of one kind differ by what their drivers reserve
OWN_USE = 2 * GIB  # what CUDA and NCCL use for a process at most, before torch allocates anything


@dataclass(frozen=True)
class Context:
    """The place of this process among the ranks, its device and its number format."""

    parallel_state: ParallelState
    device: torch.device
    dtype: torch.dtype
    log: logging.Logger
    host_memory_bytes: int
    """A rank's share of the host memory that was free at the start, on the machine with the least."""
    device_memory_bytes: int = 0
    """Memory of the smallest GPU, without what other processes use; 0 without GPUs."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    link: LinkRates | None = None
    """Rates of the link to the host, where they have been measured."""
    disk_rates: DiskRates | None = None
    """Rates of the disk for chunks, if there is one."""
    disk_bytes: int = 0
    """What chunks may use there: a rank's share of what was free at the start, on the machine with the least."""

    @property
    def is_first_rank(self) -> bool:
        return self.parallel_state.rank == 0


def device_type() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def number_format(config: Config) -> torch.dtype:
    """Return the dtype of parameters and activations."""
    if config.precision.bf16:
        return torch.bfloat16
    return torch.float16 if config.precision.fp16 else torch.float32


def initialize(config: Config, watchdog: Watchdog | None = None) -> Context:
    """Join the other ranks, choose the device and seed the random numbers. Collective over all ranks.

    The watchdog starts here. ConfigError where the launcher's environment is impossible, or where the ranks' settings,
    data or code differ; RankLost where rank 0 does not join.
    """
    world = World.from_environment()
    world.complete_environment()
    watchdog = watchdog or Watchdog(world.rank, world.size)
    log = configure_logging(world.rank)
    on_gpu = device_type() == "cuda"
    device = torch.device("cuda", local_rank(torch.cuda.device_count())) if on_gpu else torch.device("cpu")
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        _start_process_group(config, world, device, timeout, watchdog)
    elif on_gpu:
        torch.cuda.set_device(device)
    # Dropout masks differ between ranks; the weights come from a generator of their own, the same on every rank.
    torch.manual_seed(config.training.seed + world.rank)
    parallel_state = ParallelState.create(config.parallel.ds_sequence_parallel_size, timeout)
    watchdog.enter("comparing the memory of all ranks")
    # Every rank must make the same choices.
    device_memory = usable_device_bytes(*torch.cuda.mem_get_info(device)) if on_gpu else 0
    host_bytes, smallest, largest = least_over_ranks(
        available_host_bytes() // local_world_size(), device_memory, device
    )
    if smallest < SAME_SIZE * largest:
        log.warning(
            "the GPUs of this run have between %.1f and %.1f GiB: every rank uses as much, so the smallest counts; "
            "choose others with CUDA_VISIBLE_DEVICES or the hostfile to use the larger ones in full",
            smallest / GIB, largest / GIB,
        )  # fmt: skip
    return Context(parallel_state, device, number_format(config), log, host_bytes, smallest, watchdog)


def _start_process_group(
    config: Config, world: World, device: torch.device, timeout: timedelta, watchdog: Watchdog
) -> None:
    store = join(world, timeout.total_seconds(), watchdog)
    if world.size > 1:
        with watchdog.working("comparing settings, data and code"):
            settings = settings_of(config, world.size, device.type)
        require_same_settings(settings, world.rank, world.size, store)
    watchdog.enter("starting the process group")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        # The watchdog names the rank that died; NCCL's would abort this one before that, without a name.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )


def usable_device_bytes(free: int, total: int) -> int:
    """Return the memory of a GPU without what other processes use; CUDA's own use for this process does not count."""
    return min(total, free + OWN_USE)


def least_over_ranks(host_bytes: int, device_bytes: int, device: torch.device) -> tuple[int, int, int]:
    """Return (least host memory, least and most device memory) over all ranks. Collective over all of them."""
    sizes = torch.tensor([host_bytes, device_bytes, -device_bytes], device=device)
    dist.all_reduce(sizes, dist.ReduceOp.MIN)
    host, smallest, largest = sizes.tolist()
    return host, smallest, -largest
