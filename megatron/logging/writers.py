"""Where metrics go besides the log: TensorBoard, Weights & Biases, both or nowhere, behind one protocol."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron.config.errors import ConfigError
from megatron.config.logging import LoggingConfig


class MetricWriter(Protocol):
    """Takes the scalars of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store `metrics` (name to value) under the iteration `step`."""

    def close(self) -> None:
        """Flush what is buffered. Nothing is written afterwards."""


class TensorBoardWriter:
    """Writes an event file into `directory`."""

    def __init__(self, directory: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._summary = SummaryWriter(log_dir=directory)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._summary.add_scalar(name, value, step)
        self._summary.flush()

    def close(self) -> None:
        self._summary.close()


def require_wandb(project: str) -> None:
    """Raise ConfigError if the wandb package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"--wandb-project ({project}) needs the wandb package, which is not installed; run "
            "`pip install wandb`, or drop the flag and use --tensorboard-dir, which always works."
        )


class WandbWriter:
    """Logs to a run of Weights & Biases.

    Raises:
        ConfigError: the wandb package is not installed.
    """

    def __init__(
        self, project: str, name: str | None, directory: str | None, run_config: Mapping[str, Any] | None = None
    ) -> None:
        require_wandb(project)
        import wandb

        self._run = wandb.init(project=project, name=name, dir=directory, config=dict(run_config or {}))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class WriterGroup:
    """Passes everything on to each of its writers; with none it drops everything."""

    def __init__(self, writers: Sequence[MetricWriter] = ()) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def build_writer(logging_config: LoggingConfig, rank: int, run_config: Mapping[str, Any] | None = None) -> MetricWriter:
    """Return the writer that the settings ask for; only rank 0's writes anything.

    `run_config` is shown beside the run where the service has a place for it.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """
    writers: list[MetricWriter] = []
    if rank == 0 and logging_config.wandb_project:
        name, directory = logging_config.wandb_exp_name, logging_config.wandb_save_dir
        writers.append(WandbWriter(logging_config.wandb_project, name, directory, run_config))
    if rank == 0 and logging_config.tensorboard_dir:
        writers.append(TensorBoardWriter(logging_config.tensorboard_dir))
    return WriterGroup(writers)
