"""Start a training script as a launcher would, one process per rank, and read its log.

    run = run_training(["--num-layers", "2", ...], num_ranks=4)
    run.losses[20], run.grad_norms[20]

The environment carries what `torchrun` and `deepspeed` set: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
and MASTER_PORT. `launch` is the same without the reading: it also serves runs that must fail.
"""

import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.rank_process import REPOSITORY, RankProcess, start_rank

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.05
TAIL_CHARACTERS = 4000

_ITERATION = re.compile(r"iteration\s+(\d+)\s*/\s*\d+\s*\|(.*)$")
_LOSS = re.compile(r"\blm loss:\s*(\S+)")
_GRAD_NORM = re.compile(r"\bgrad norm:\s*(\S+)")
_VALIDATION = re.compile(r"validation loss at iteration\s+(\d+)\s*\|\s*lm loss value:\s*(\S+)")


@dataclass(frozen=True)
class Launch:
    """How every rank ended: its exit code (None if killed for being late) and what it wrote, both streams."""

    exit_codes: list[int | None]
    outputs: list[str]

    @property
    def succeeded(self) -> bool:
        return all(code == 0 for code in self.exit_codes)

    def describe(self) -> str:
        """Return the end of what every rank wrote."""
        return "\n".join(
            f"--- rank {rank}: {'killed' if code is None else f'exit code {code}'}\n{output[-TAIL_CHARACTERS:]}"
            for rank, (code, output) in enumerate(zip(self.exit_codes, self.outputs, strict=True))
        )


@dataclass(frozen=True)
class TrainingRun:
    """What the log of a run says, by iteration; a gradient norm or loss that is not a number is absent."""

    losses: dict[int, float]
    grad_norms: dict[int, float]
    validation_losses: dict[int, float]
    output: str


class TrainingFailure(AssertionError):
    """A rank exited with an error or was late; the message carries what every rank wrote last."""


def run_training(
    flags: Sequence[str],
    num_ranks: int,
    *,
    script: Path = REPOSITORY / "pretrain_gpt.py",
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 300.0,
) -> TrainingRun:
    """Run the training script on `num_ranks` gloo ranks and return what its log says.

    Raises:
        TrainingFailure: a rank exited with another code than 0, or the run was late.
    """
    finished = launch(script, flags, num_ranks, environment=environment, timeout_seconds=timeout_seconds)
    if not finished.succeeded:
        raise TrainingFailure(f"{script.name} on {num_ranks} ranks failed:\n{finished.describe()}")
    return read_log("\n".join(finished.outputs))


def read_log(text: str) -> TrainingRun:
    """Read the log lines of a run out of everything that its ranks wrote."""
    losses: dict[int, float] = {}
    grad_norms: dict[int, float] = {}
    validation_losses: dict[int, float] = {}
    for line in text.splitlines():
        if match := _VALIDATION.search(line):
            _keep(validation_losses, int(match[1]), match[2])
        elif match := _ITERATION.search(line):
            for target, pattern in ((losses, _LOSS), (grad_norms, _GRAD_NORM)):
                if value := pattern.search(match[2]):
                    _keep(target, int(match[1]), value[1])
    return TrainingRun(losses, grad_norms, validation_losses, text)


def _keep(target: dict[int, float], iteration: int, text: str) -> None:
    try:
        target[iteration] = float(text)
    except ValueError:
        return


def launch(
    script: Path,
    flags: Sequence[str],
    num_ranks: int,
    *,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 300.0,
) -> Launch:
    """Run `script flags...` once per rank; when one rank fails, the others get a moment and are killed."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **(environment or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"rank{rank}.log" for rank in range(num_ranks)]
        processes = [
            start_rank(script, flags, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, path, path)
            for rank, path in enumerate(paths)
        ]
        try:
            _wait(processes, timeout_seconds)
        finally:
            exit_codes = [process.poll() for process in processes]
            for process in processes:
                _kill(process)
        return Launch(exit_codes, [path.read_text(errors="replace") for path in paths])


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(processes: Sequence[RankProcess], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    failed = False
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.poll() not in (None, 0) for process in processes):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


def _kill(process: RankProcess) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
