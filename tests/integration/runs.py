"""Runs of `pretrain_gpt.py` on a small model, and what they leave behind.

The log shows seven digits of a loss and three of a gradient norm. TensorBoard's events hold both as fp32 numbers, so
`train` reads them from there.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor

from tests.distributed.launcher import REPOSITORY, free_port, run_training
from tests.distributed.rank_process import start_rank
from tests.integration.corpus import VOCAB_SIZE

POLL_SECONDS = 0.005
SCRIPT = REPOSITORY / "pretrain_gpt.py"
SEQ_LENGTH = 64
SIZES = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", str(SEQ_LENGTH)]
TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)]
TRAINING = ["--global-batch-size", "4", "--lr", "3e-3", "--log-interval", "1", "--eval-iters", "0"]

GPT = ["--openai-gelu"]
LLAMA = [
    *["--num-key-value-heads", "2", "--use-rotary-position-embeddings", "--normalization", "rmsnorm", "--swiglu"],
    *["--disable-bias-linear", "--untie-embeddings-and-output-weights"],
]
MODELS = {"gpt": GPT, "llama": LLAMA}

PLAIN: list[str] = []
FPDT = ["--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-chunk-size", "24"]  # chunks of 24, 24 and 16
OFFLOADED = [*FPDT, "--ds-sequence-parallel-fpdt-offloading"]
THRIFTY = ["--ds-sequence-parallel-fpdt-checkpoint-interval", "2", "--ds-sequence-parallel-fpdt-recompute", "kv"]
REBUILT = [*OFFLOADED, *THRIFTY]
KEPT = [*OFFLOADED, "--ds-sequence-parallel-fpdt-recompute", "none"]
RECOMPUTED = [*REBUILT, "--ds-sequence-parallel-fpdt-recompute", "attention"]
EXECUTIONS = {
    "plain": PLAIN, "fpdt": FPDT, "offloaded": OFFLOADED, "rebuilt": REBUILT, "kept": KEPT, "recomputed": RECOMPUTED,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run reported, by iteration, and the text of its log."""

    losses: dict[int, float]
    grad_norms: dict[int, float]
    validation_losses: dict[int, float]
    output: str


def base_flags(corpus: Path, model: Sequence[str] = LLAMA) -> list[str]:
    """Return the flags of a small run; later ones win over them."""
    return [*SIZES, *TOKENIZER, *TRAINING, *model, "--data-path", str(corpus), "--split", "90,6,4"]


def ranks(sequence_parallel: int = 1, zero_stage: int = 0) -> list[str]:
    """Return the flags that spread a run."""
    return ["--ds-sequence-parallel-size", str(sequence_parallel), "--zero-stage", str(zero_stage)]


def train(flags: Sequence[str], folder: Path, num_ranks: int = 1, script: Path = SCRIPT) -> Run:
    """Train on `num_ranks` gloo ranks, with TensorBoard's events in a new `folder`; fails if a rank does."""
    log = run_training([*flags, "--tensorboard-dir", str(folder)], num_ranks, script=script)
    scalars = read_events(folder)
    return Run(
        scalars.get("train/loss", {}),
        scalars.get("train/grad_norm", {}),
        scalars.get("validation/loss", {}),
        log.output,
    )


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Return every scalar that TensorBoard's events in a folder hold: name to iteration to value."""
    scalars: dict[str, dict[int, float]] = {}
    for path in folder.glob("events.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.tensor.float_val[0]
    return scalars


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return every tensor in the files of a checkpoint: file and path within it to tensor."""
    return {
        f"{path.name}{place}": tensor
        for path in sorted(checkpoint.glob("*.pt"))
        for place, tensor in _tensors(torch.load(path, map_location="cpu", weights_only=False), "")
    }


def _tensors(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, member in items:
        yield from _tensors(member, f"{place}/{key}")


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its exit code and the two streams."""

    exit_code: int
    stdout: str
    stderr: str


class Ranks:
    """Processes of a run that is watched while it goes on. A context manager: what still runs at its end is killed."""

    def __init__(
        self,
        flags: Sequence[str],
        num_ranks: int = 1,
        world_size: int | None = None,
        script: Path = SCRIPT,
        last_rank: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """Start `num_ranks` processes and tell them that they are the first ones of `world_size` (default: all).

        `last_rank` are further flags of the last one.
        """
        size = str(world_size or num_ranks)
        world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        meeting_point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **meeting_point, **world}
        self._folder = Path(tempfile.mkdtemp())
        self.processes = [
            start_rank(
                script,
                [*flags, *(last_rank if rank == num_ranks - 1 else ())],
                {**settings, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
                self._log(rank, "stdout"),
                self._log(rank, "stderr"),
            )
            for rank in range(num_ranks)
        ]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def wait_for(self, text: str, timeout_seconds: float = 120.0) -> None:
        """Wait until rank 0 has written `text`."""
        self.watch_for(text, timeout_seconds)
        assert text in self.log(), f"rank 0 ended without {text!r}, or is late:\n{self.log()}{self.log(0, 'stderr')}"

    def watch_for(self, text: str, seconds: float) -> None:
        """Wait so many seconds, or less if rank 0 comes to write `text` or ends."""
        deadline = time.monotonic() + seconds
        while self.processes[0].poll() is None and text not in self.log():
            if (left := deadline - time.monotonic()) <= 0:
                return
            time.sleep(min(left, POLL_SECONDS))

    def wait(self, timeout_seconds: float = 120.0) -> list[Ended]:
        """Wait for every rank to end by itself."""
        deadline = time.monotonic() + timeout_seconds
        return [self.end_of(rank, max(1.0, deadline - time.monotonic())) for rank in range(len(self.processes))]

    def end_of(self, rank: int, timeout_seconds: float = 120.0) -> Ended:
        """Wait for one rank to end by itself."""
        code = self.processes[rank].wait(timeout_seconds)
        return Ended(code, self.log(rank, "stdout"), self.log(rank, "stderr"))

    def kill(self, first: int = 0, pause_seconds: float = 0.0) -> None:
        """Kill every rank; the others a moment after the first."""
        for number, process in enumerate([*self.processes[first:], *self.processes[:first]]):
            process.kill()
            if number == 0:
                time.sleep(pause_seconds)
        for process in self.processes:
            process.wait()

    def log(self, rank: int = 0, stream: str = "stdout") -> str:
        """Return what a rank has written."""
        path = self._log(rank, stream)
        return path.read_text(errors="replace") if path.exists() else ""

    def _log(self, rank: int, stream: str) -> Path:
        return self._folder / f"rank{rank}.{stream}"
