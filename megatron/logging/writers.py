"""Metric writers: TensorBoard, Weights & Biases, both or none, behind one protocol.

Training continues when metrics cannot be written, for example to a full disk: one warning reports it, and the log has
all metrics.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron.config.errors import ConfigError
from megatron.config.logging import LoggingConfig
from megatron.config.packages import require_package

EVENT_FILE_VERSION = "brain.Event:2"
LOG = logging.getLogger("megatron")


class MetricWriter(Protocol):
    """Takes the scalars of a step. The methods raise OSError where they cannot be stored."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store `metrics` (name to value) under the iteration `step`."""

    def discard_after(self, step: int) -> None:
        """Let readers ignore what was stored for later iterations, as the run continues from `step`."""

    def close(self) -> None:
        """Flush the buffers. Nothing is written afterwards."""


class TensorBoardWriter:
    """Writes an event file into `directory`, without the thread of TensorBoard's own writer, whose errors are lost.

    Raises OSError if the file cannot be created.
    """

    def __init__(self, directory: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._session_log = Event, Summary, SessionLog
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # readers read the files of a folder in the order of their names
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._add(file_version=EVENT_FILE_VERSION)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def discard_after(self, step: int) -> None:
        self._add(step=step + 1, session_log=self._session_log(status=self._session_log.START))

    def close(self) -> None:
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


class WandbWriter:
    """Logs to a Weights & Biases run."""

    def __init__(
        self, project: str, name: str | None, directory: str | None, run_config: Mapping[str, Any] | None = None
    ) -> None:
        import wandb

        self._run = wandb.init(project=project, name=name, dir=directory, config=dict(run_config or {}))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def discard_after(self, step: int) -> None:
        """Do nothing: the service itself drops values of steps before its last one."""

    def close(self) -> None:
        self._run.finish()


class WriterGroup:
    """Forwards metrics to each of its writers, or drops them if it has none.

    A writer that raises OSError is dropped, with one warning.
    """

    def __init__(self, writers: Sequence[MetricWriter] = ()) -> None:
        self._writers = list(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda writer: writer.write(step, metrics))

    def discard_after(self, step: int) -> None:
        self._each(lambda writer: writer.discard_after(step))

    def close(self) -> None:
        self._each(lambda writer: writer.close())

    def _each(self, action: Callable[[MetricWriter], None]) -> None:
        for writer in tuple(self._writers):
            try:
                action(writer)
            except OSError as error:
                self._drop(writer, error)

    def _drop(self, writer: MetricWriter, error: OSError) -> None:
        LOG.warning(
            "%s cannot store metrics: %s; training continues without it, and the log has them all",
            type(writer).__name__, error.strerror or error,
        )  # fmt: skip
        self._writers.remove(writer)
        with suppress(OSError):
            writer.close()


def require_writer_packages(logging_config: LoggingConfig) -> None:
    """Raise ConfigError if a writer that the settings select lacks its package."""
    if logging_config.wandb_project:
        require_package("wandb", f"--wandb-project ({logging_config.wandb_project})")
    if logging_config.tensorboard_dir:
        require_package("tensorboard", f"--tensorboard-dir ({logging_config.tensorboard_dir})")


def build_writer(logging_config: LoggingConfig, rank: int, run_config: Mapping[str, Any] | None = None) -> MetricWriter:
    """Return the writer that the settings select; only that of rank 0 writes anything.

    `run_config` is shown with the run where the service supports it.

    Raises:
        ConfigError: the package of a writer is not installed, or TensorBoard's folder cannot be written.
    """
    if rank == 0:
        require_writer_packages(logging_config)
    writers: list[MetricWriter] = []
    if rank == 0 and logging_config.wandb_project:
        name, directory = logging_config.wandb_exp_name, logging_config.wandb_save_dir
        writers.append(WandbWriter(logging_config.wandb_project, name, directory, run_config))
    if rank == 0 and logging_config.tensorboard_dir:
        try:
            writers.append(TensorBoardWriter(logging_config.tensorboard_dir))
        except OSError as error:
            folder, reason = logging_config.tensorboard_dir, error.strerror
            raise ConfigError(
                f"--tensorboard-dir ({folder}) cannot be written: {reason}; make room, or name another folder."
            ) from error
    return WriterGroup(writers)
