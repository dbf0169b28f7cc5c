"""Run a function on N ranks that stay alive between calls.

Starting a Python process that imports torch takes seconds, a gloo process group milliseconds. So the processes are kept
and every call gets a fresh process group of the size it asks for:

    with RankPool() as pool:
        per_rank = pool.run(function, case, num_ranks=4)    # [function(case) of rank 0, of rank 1, ...]

`function` is a module-level function of an importable module; arguments and results are pickled. Within it
`torch.distributed` is initialised (num_ranks=1 included) and each process computes on one thread. When a rank raises,
dies or is late, all processes are killed, the call raises RankFailure with the traceback of that rank, and the next
call starts anew.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

REPOSITORY = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 2.0


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message carries what it said."""


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


@dataclass(frozen=True)
class _Failure:
    text: str


class RankPool:
    """Processes that wait for work; as many are started as the largest call has asked for."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Result], *arguments: Any, num_ranks: int, timeout_seconds: float = 60.0
    ) -> list[Result]:
        """Call `function(*arguments)` on every rank of a fresh gloo world and return the results in rank order.

        Raises:
            RankFailure: a rank raised, died, or some rank did not finish within `timeout_seconds`.
        """
        while len(self._workers) < num_ranks:
            self._workers.append(_start_worker())
        workers = self._workers[:num_ranks]
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(workers):
                world = (rank, num_ranks, f"file://{folder}/rendezvous", timeout_seconds)
                worker.connection.send_bytes(pickle.dumps((world, function, arguments)))
            try:
                return _collect(workers, timeout_seconds)
            except RankFailure:
                self.close()
                raise

    def close(self) -> None:
        """Kill every process: nothing that they hold outlives a call."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()


def _start_worker() -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    environment = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # read by the libraries as the child loads them
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ |= environment
    theirs.close()
    return _Worker(process, ours)


def _collect(workers: list[_Worker], timeout_seconds: float) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    answers: dict[int, Any] = {}
    while len(answers) < len(workers):
        waiting = {workers[rank].connection: rank for rank in range(len(workers)) if rank not in answers}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"ranks {sorted(waiting.values())} did not finish within {timeout_seconds:g} s")
        answers |= {waiting[connection]: _receive(connection) for connection in ready}  # type: ignore[index, arg-type]
        if any(isinstance(answer, _Failure) for answer in answers.values()):
            raise RankFailure(_describe(workers, answers))
    return [answers[rank] for rank in range(len(workers))]


def _describe(workers: list[_Worker], answers: dict[int, Any]) -> str:
    """Wait a moment for other ranks' own errors: the first to report may only have lost its peer."""
    deadline = time.monotonic() + GRACE_SECONDS
    for rank, worker in enumerate(workers):
        if rank not in answers and worker.connection.poll(max(0.0, deadline - time.monotonic())):
            answers[rank] = _receive(worker.connection)
    failures = {rank: answer for rank, answer in sorted(answers.items()) if isinstance(answer, _Failure)}
    return "\n".join(f"rank {rank} of {len(workers)} failed:\n{failure.text}" for rank, failure in failures.items())


def _receive(connection: Connection) -> Any:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return _Failure("the process ended without an answer (killed, or it crashed outside Python)")


def _serve(connection: Connection) -> None:
    """Serve calls until the parent goes away."""
    sys.path.insert(0, str(REPOSITORY))
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        connection.send_bytes(_answer(message))


def _answer(message: bytes) -> bytes:
    import torch.distributed as dist

    try:
        (rank, num_ranks, rendezvous, timeout_seconds), function, arguments = pickle.loads(message)
        dist.init_process_group(
            "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_seconds),
        )
        result = pickle.dumps(function(*arguments))
        dist.barrier()  # no rank leaves while another still talks to it
        return result
    except BaseException:
        return pickle.dumps(_Failure(traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
