"""Runs of `pretrain_gpt.py` as forks of a process that has imported everything: one starts in a second, not in ten.

with ForkedRun(flags, num_ranks, folder) as run:
    run.wait_for("iteration        1/")
    run.kill()                              # SIGKILL to every rank
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.distributed.launcher import REPOSITORY, free_port

PRELOADED = ["deepspeed", "tensorboard.summary.writer.record_writer", "pretrain_gpt"]
POLL_SECONDS = 0.005


class ForkedRun:
    """The ranks of one run; what still runs at the end of the context is killed."""

    def __init__(self, flags: Sequence[str], num_ranks: int, folder: Path) -> None:
        """Start them; each writes FOLDER/rankN.log."""
        folder.mkdir()
        settings = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
        self._ranks = [
            _context().Process(target=_train, args=(list(flags), {**settings, "RANK": str(rank)}, str(log)))
            for rank, log in enumerate(self._logs)
        ]
        for rank in self._ranks:
            rank.start()

    def __enter__(self) -> "ForkedRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_for(self, text: str, timeout_seconds: float = 120.0) -> None:
        """Wait until rank 0's log holds `text`."""
        deadline = time.monotonic() + timeout_seconds
        while text not in self.log():
            assert self._ranks[0].is_alive(), f"rank 0 ended without {text!r}:\n{self.log()}"
            assert time.monotonic() < deadline, f"rank 0 is late with {text!r}:\n{self.log()}"
            time.sleep(POLL_SECONDS)

    def watch_for(self, text: str, seconds: float) -> None:
        """Wait so many seconds, or less if rank 0's log comes to hold `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.log() and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))

    def wait(self, timeout_seconds: float = 120.0) -> None:
        """Wait until every rank has ended well."""
        for rank in self._ranks:
            rank.join(timeout_seconds)
        assert self.exit_codes() == [0] * len(self._ranks), self.log()

    def kill(self, first: int = 0, pause_seconds: float = 0.0) -> None:
        """Kill every rank; the others a moment after the first."""
        for number, rank in enumerate([*self._ranks[first:], *self._ranks[:first]]):
            rank.kill()
            if number == 0:
                time.sleep(pause_seconds)
        for rank in self._ranks:
            rank.join()

    def exit_codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self._ranks]

    def log(self) -> str:
        """Return what rank 0 has written."""
        return self._logs[0].read_text(errors="replace") if self._logs[0].exists() else ""


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    if str(REPOSITORY) not in os.environ.get("PYTHONPATH", ""):  # the server imports by this path alone
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    os.environ["OMP_NUM_THREADS"] = "1"
    context.set_forkserver_preload(PRELOADED)
    return context


def _train(flags: list[str], settings: dict[str, str], log: str) -> None:
    os.environ.update(settings, LOCAL_RANK=settings["RANK"], LOCAL_WORLD_SIZE=settings["WORLD_SIZE"])
    os.chdir(REPOSITORY)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    import torch

    from pretrain_gpt import leave, main

    torch.set_num_threads(1)
    leave(main(flags))
