"""What a launcher's environment may say, and where ranks meet."""

import socket
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron.config import ConfigError
from megatron.ranks.watchdog import RankLost, Watchdog
from megatron.ranks.world import World, join, local_rank, local_world_size
from tests.distributed.launcher import free_port

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_a_launcher_is_a_world_of_its_own() -> None:
    world = World.from_environment()
    assert (world.rank, world.size, world.address) == (0, 1, "127.0.0.1")
    assert world.port > 0
    assert local_world_size() == 1


def test_a_launcher_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**LAUNCHED, "LOCAL_SIZE": "8", "LOCAL_RANK": "5"})
    assert World.from_environment() == World(1, 2, "127.0.0.1", 29500)
    assert (local_world_size(), local_rank(8)) == (8, 5)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"RANK": "abc"}, r"RANK \('abc'\) must be a whole number"),
        ({"RANK": "-1"}, r"RANK \(-1\) must be at least 0 and below WORLD_SIZE \(2\)"),
        ({"RANK": "2", "WORLD_SIZE": "1"}, r"RANK \(2\) must be at least 0 and below WORLD_SIZE \(1\)"),
        ({"RANK": ""}, "RANK is not set and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE \(0\) must be 1 or more"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE \('two'\) must be a whole number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set and WORLD_SIZE is 2"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set and WORLD_SIZE is 2"),
        ({"MASTER_PORT": "abc"}, r"MASTER_PORT \('abc'\) must be a whole number"),
        ({"MASTER_PORT": "0"}, r"MASTER_PORT \(0\) must be from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, r"MASTER_PORT \(65536\) must be from 1 to 65535"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], message: str
) -> None:
    set_all(monkeypatch, {**LAUNCHED, **values})
    with pytest.raises(ConfigError, match=message):
        World.from_environment()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK \(4\) must be from 0 to 3, one of the 4 GPUs"):
        local_rank(4)


@pytest.fixture
def busy_port() -> Iterator[int]:
    """One where something listens and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_refused(busy_port: int) -> None:
    with pytest.raises(ConfigError, match=rf"MASTER_PORT \({busy_port}\) is in use on the machine of rank 0"):
        join(World(0, 1, "127.0.0.1", busy_port), 3.0, Watchdog())


def test_an_unknown_machine_is_refused() -> None:
    for rank in range(2):
        with pytest.raises(ConfigError, match=r"MASTER_ADDR \(no.such.host.invalid\) cannot be resolved"):
            join(World(rank, 2, "no.such.host.invalid", 29500), 3.0, Watchdog(rank, 1))


def test_a_first_rank_that_never_comes_is_missed() -> None:
    with pytest.raises(RankLost, match=r"^rank\(s\) 0 of 2 did not join within 0.005 minutes"):
        join(World(1, 2, "127.0.0.1", free_port()), 0.4, Watchdog(1, 1))


def test_no_two_processes_join_as_one_rank() -> None:
    port = free_port()
    stores = [join(World(rank, 2, "127.0.0.1", port), 30.0, Watchdog(rank, 1)) for rank in range(2)]
    assert all(isinstance(store, dist.Store) for store in stores)
    with pytest.raises(ConfigError, match=rf"another process has joined as rank 1 at 127.0.0.1:{port}"):
        join(World(1, 2, "127.0.0.1", port), 30.0, Watchdog(1, 1))
