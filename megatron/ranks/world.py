"""Rendezvous: the ranks from the launcher's environment, and the key-value store that all of them share."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron.config import ConfigError
from megatron.ranks.watchdog import PATIENCE, RankLost, Watchdog

LAUNCHERS = "start with deepspeed or torchrun, which set it"
POLL_SECONDS = 0.2
LARGEST_PORT = 2**16 - 1


@dataclass(frozen=True)
class World:
    """A rank of a run. A process that no launcher started is a world of size 1."""

    rank: int
    size: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. ConfigError for impossible values."""
        size = _whole_number("WORLD_SIZE", 1)
        rank = _whole_number("RANK", 0)
        if size < 1:
            raise ConfigError(f"WORLD_SIZE ({size}) must be 1 or more; {LAUNCHERS}, or unset it for one process")
        if not 0 <= rank < size:
            raise ConfigError(f"RANK ({rank}) must be at least 0 and below WORLD_SIZE ({size}); {LAUNCHERS}")
        if size > 1:
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
                if not os.environ.get(name):
                    raise ConfigError(f"{name} is not set and WORLD_SIZE is {size}; {LAUNCHERS}, or set it")
        port = _whole_number("MASTER_PORT", 0)
        if port not in range(1, LARGEST_PORT + 1) and os.environ.get("MASTER_PORT"):
            raise ConfigError(f"MASTER_PORT ({port}) must be from 1 to {LARGEST_PORT}; name a free one")
        return cls(rank, size, os.environ.get("MASTER_ADDR") or "127.0.0.1", port or _free_port())

    def complete_environment(self) -> None:
        """Set the variables that torch and DeepSpeed read, for a process that no launcher started."""
        values = {"RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_RANK": 0}
        for name, value in {**values, "MASTER_ADDR": self.address, "MASTER_PORT": self.port}.items():
            os.environ.setdefault(name, str(value))


def local_rank(num_gpus: int) -> int:
    """Return the index of this process's GPU on this machine. ConfigError where there is no such GPU."""
    rank = _whole_number("LOCAL_RANK", 0)
    if not 0 <= rank < num_gpus:
        raise ConfigError(
            f"LOCAL_RANK ({rank}) must be from 0 to {num_gpus - 1}, one of the {num_gpus} GPUs that this process sees; "
            f"start at most {num_gpus} processes on this machine, or let CUDA_VISIBLE_DEVICES show more"
        )
    return rank


def local_world_size() -> int:
    """Return the number of ranks on this machine, as torchrun or the deepspeed launcher set it."""
    return _whole_number("LOCAL_WORLD_SIZE", 0) or _whole_number("LOCAL_SIZE", 1)


def join(world: World, limit_seconds: float, watchdog: Watchdog) -> dist.Store:
    """Open the store that the ranks share, which rank 0 or torchrun hosts, and claim this rank in it.

    ConfigError for an impossible address and for a rank that another process has claimed; RankLost where rank 0 does
    not join within the time limit.
    """
    timeout = timedelta(seconds=limit_seconds)
    has_store = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # torchrun may restart the ranks with the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def connect(is_master: bool = False) -> dist.Store:
        store = dist.TCPStore(
            world.address, world.port, world.size, is_master, timeout, wait_for_workers=False, multi_tenant=True
        )
        return dist.PrefixStore(f"attempt {attempt}", store)

    if not has_store:
        _wait_for_port(world, PATIENCE * limit_seconds)
        watchdog.start(limit_seconds, connect)
        store = connect()
    else:
        _resolve(world)
        store = _opened(lambda: connect(is_master=True), world)
        watchdog.start(limit_seconds, connect, store)
    if store.add(f"rank {world.rank}", 1) > 1:
        raise ConfigError(
            f"another process has joined as rank {world.rank} at {world.address}:{world.port}; every process of a run "
            "needs a RANK of its own, and every run a MASTER_PORT of its own"
        )
    return store


def _opened(open_store: Callable[[], dist.Store], world: World) -> dist.Store:
    try:
        return open_store()
    except RuntimeError as error:
        reason = "is in use" if "EADDRINUSE" in str(error) else f"cannot be listened on ({str(error).splitlines()[0]})"
        raise ConfigError(
            f"MASTER_PORT ({world.port}) {reason} on the machine of rank 0; name a free one, with --master_port of "
            "deepspeed and torchrun"
        ) from None


def _wait_for_port(world: World, seconds: float) -> None:
    """Wait until a process listens at MASTER_ADDR and MASTER_PORT."""
    _resolve(world)
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((world.address, world.port), timeout=max(seconds, 1.0)):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankLost(
                    f"rank(s) 0 of {world.size} did not join within {seconds / 60:.3g} minutes: {world.address}:"
                    f"{world.port} (MASTER_ADDR, MASTER_PORT) does not answer ({error.strerror or error})"
                ) from None
        time.sleep(POLL_SECONDS)


def _resolve(world: World) -> None:
    try:
        socket.getaddrinfo(world.address, world.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"MASTER_ADDR ({world.address}) cannot be resolved ({reason}); name the machine of rank 0, or its address"
        ) from None


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} ({text!r}) must be a whole number; {LAUNCHERS}, or unset it") from None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
