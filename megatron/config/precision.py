"""Settings for number formats and loss scaling."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision.

    Without --bf16 or --fp16 a run is in fp32.
    """

    fp16: bool = False
    """Train in fp16 with loss scaling; needs a GPU."""

    bf16: bool = False
    """Train in bf16."""

    loss_scale: float | None = None
    """Fixed fp16 loss scale. Default: dynamic."""

    initial_loss_scale: float = 2.0**16
    """First value of the dynamic loss scale, a power of two."""

    min_loss_scale: int = 1
    """Smallest value of the dynamic loss scale."""

    loss_scale_window: int = 1000
    """Iterations without overflow after which the dynamic loss scale doubles."""

    hysteresis: int = 2
    """Overflows before the dynamic loss scale is halved."""
