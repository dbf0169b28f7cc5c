"""From a configuration to a place in the world: process group, device, seeds, log; a value that is passed on."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.config import Config
from megatron.core.host_memory import available_host_bytes
from megatron.core.parallel_state import ParallelState
from megatron.logging.logger import configure_logging

GIB = 2**30
SAME_SIZE = 0.95  # GPUs of one kind differ by what their drivers keep


@dataclass(frozen=True)
class Context:
    """Where this process runs and in which number format."""

    parallel_state: ParallelState
    device: torch.device
    dtype: torch.dtype
    log: logging.Logger
    host_memory_bytes: int
    """A rank's share of the host memory that was free at the start, on the machine with the least."""
    device_memory_bytes: int = 0
    """Memory of the smallest GPU; 0 without GPUs."""

    @property
    def is_first_rank(self) -> bool:
        return self.parallel_state.rank == 0


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as the launcher set them; (0, 1) for a process that was started by itself."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this machine, as torchrun or the deepspeed launcher set them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def device_type() -> str:
    """The kind of device that this machine computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def number_format(config: Config) -> torch.dtype:
    """The type of parameters and activations."""
    if config.precision.bf16:
        return torch.bfloat16
    return torch.float16 if config.precision.fp16 else torch.float32


def initialize(config: Config) -> Context:
    """Join the process group, take a device and seed the random numbers. Collective over all ranks."""
    _complete_environment()
    rank, _ = world_from_environment()
    log = configure_logging(rank)
    on_gpu = device_type() == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None)
    # Dropout masks differ between ranks; the weights come from a generator of their own, the same on every rank.
    torch.manual_seed(config.training.seed + rank)
    parallel_state = ParallelState.create(config.parallel.ds_sequence_parallel_size)
    # Every rank must come to the same choices.
    device_memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    host_bytes, smallest, largest = least_over_ranks(
        available_host_bytes() // local_world_size(), device_memory, device
    )
    if smallest < SAME_SIZE * largest:
        log.warning(
            "the GPUs of this run have between %.1f and %.1f GiB: every rank holds as much, so the smallest counts; "
            "choose others with CUDA_VISIBLE_DEVICES or the hostfile to use the larger ones in full",
            smallest / GIB, largest / GIB,
        )  # fmt: skip
    return Context(parallel_state, device, number_format(config), log, host_bytes, smallest)


def least_over_ranks(host_bytes: int, device_bytes: int, device: torch.device) -> tuple[int, int, int]:
    """(least host memory, least and most device memory) over all ranks. Collective over all of them."""
    sizes = torch.tensor([host_bytes, device_bytes, -device_bytes], device=device)
    dist.all_reduce(sizes, dist.ReduceOp.MIN)
    host, smallest, largest = sizes.tolist()
    return host, smallest, -largest


def connect_store(timeout_seconds: float) -> dist.Store:
    """A connection of its own to the key-value store that the ranks met at, for a thread of its own."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_seconds)
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _complete_environment() -> None:
    """What torch and DeepSpeed read, for a process that no launcher started."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
