"""Settings for log lines, metric writers, profiling and progress."""

from dataclasses import dataclass, field
from typing import Literal

LogFormat = Literal["auto", "compact", "megatron"]
ProgressStyle = Literal["auto", "bar", "line", "off"]
Profile = Literal["pt", "pt-full"]
PositionBuckets = Literal["powers-of-two", "equal"]

DEFAULT_LOG_INTERVAL = 100
ALONE = "alone"  # key of a field's metadata: the value of its flag when it is given without one


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    log_interval: int | None = None
    """Iterations between log lines. Default: 100, and each step where steps take 10 seconds or more, by the time of the
    last one; and the first step."""

    log_format: LogFormat = "auto"
    """Form of the log line of an iteration: compact, for a screen, or megatron, with all columns, which tools parse.
    auto is compact on a terminal and megatron elsewhere."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files."""

    log_loss_by_position: PositionBuckets | None = None
    """Log the mean token loss by position in the context at every evaluation. Buckets are equal, or powers of two: the
    last has the second half of the sequence, and each before it half of the rest."""

    loss_position_buckets: int = 16
    """Number of position buckets."""

    loss_spike_factor: float | None = None
    """Warn of a loss spike: a loss of more than this many times the mean of the 100 iterations before."""

    profile: Profile | None = field(default=None, metadata={ALONE: "pt"})
    """Profile some iterations with torch.profiler: write a trace for Perfetto and a summary of where the time went;
    pt-full records Python call stacks too. Without a value: pt."""

    profile_steps: str | None = None
    """First and last iteration to profile, such as 2,3: Megatron-DeepSpeed's spelling of --profile-step-start and
    --profile-step-end."""

    profile_step_start: int = 10
    """Profile the iterations after this one."""

    profile_step_end: int = 12
    """Last iteration to profile."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks to profile."""

    profile_dir: str | None = None
    """Folder for the traces and summaries of --profile. Default: the folder of --tensorboard-dir."""

    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name."""

    wandb_save_dir: str | None = None
    """Folder for the files of Weights & Biases."""

    progress: ProgressStyle = "auto"
    """Progress within an iteration; auto is a bar on a terminal and a heartbeat line elsewhere."""

    heartbeat_seconds: float = 60.0
    """Seconds between heartbeat lines."""

    peak_tflops: float | None = None
    """Dense bf16 peak of one device in TFLOP/s, for MFU. Default: looked up by the device's name."""

    @property
    def line_interval(self) -> int:
        """Iterations between log lines where steps are short."""
        return self.log_interval or DEFAULT_LOG_INTERVAL
