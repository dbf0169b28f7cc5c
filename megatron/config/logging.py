"""What is reported, how often and where to."""

from dataclasses import dataclass
from typing import Literal

ProgressStyle = Literal["auto", "bar", "line", "off"]


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = 100
    """Iterations between log lines."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard's events."""

    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name."""

    wandb_save_dir: str | None = None
    """Folder for Weights & Biases's own files."""

    progress: ProgressStyle = "auto"
    """Progress within an iteration; auto is a bar on a terminal and a heartbeat line elsewhere."""

    heartbeat_seconds: float = 60.0
    """Seconds between heartbeat lines."""

    peak_tflops: float | None = None
    """Dense bf16 peak of one device in TFLOP/s, for MFU. Default: looked up by the device's name."""
