"""Start a script as the process of one rank: as a fork of a process that has imported everything, or as a fresh one.

Importing torch and DeepSpeed takes a process seconds of CPU time, a fork a tenth of one. A fork runs the script with
the arguments, the environment, the folder and the streams that a fresh process would have. A process that has opened
CUDA cannot be forked, so on a machine with a GPU every rank is a fresh process.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
PRELOADED = [
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which deepspeed.initialize imports, and with it torch._inductor
    "tensorboard.summary.writer.record_writer",
    "torch.utils.cpp_extension",
    "pretrain_gpt",
    "finetune_llama",
]


class RankProcess(Protocol):
    """The part of subprocess.Popen that is used."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


def start_rank(
    script: Path, flags: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path
) -> RankProcess:
    """Start `script flags...` in the repository, in a process group of its own. Its streams may be one file."""
    if not torch.cuda.is_available():
        return ForkedProcess(script, flags, environment, stdout, stderr)
    with stdout.open("ab") as output, stderr.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, str(script), *flags],
            env=dict(environment),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )


class ForkedProcess:
    """A script that runs in a fork."""

    def __init__(
        self, script: Path, flags: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        self._process = _context().Process(
            target=_run_script, args=(str(script), list(flags), dict(environment), str(stdout), str(stderr))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, -N after signal N, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. TimeoutExpired if it still runs after `timeout` seconds."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    if str(REPOSITORY) not in os.environ.get("PYTHONPATH", ""):  # the server imports by this path alone
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    os.environ["OMP_NUM_THREADS"] = "1"
    context.set_forkserver_preload(PRELOADED)
    return context


def _run_script(script: str, flags: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
