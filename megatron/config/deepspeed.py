"""Settings for ZeRO, activation checkpointing and the DeepSpeed JSON."""

from dataclasses import dataclass
from typing import Literal

ZeroStage = Literal[0, 1, 2, 3]
RecomputeGranularity = Literal["full", "selective"]


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """DeepSpeed."""

    deepspeed: bool = False
    """Accepted for Megatron-DeepSpeed's scripts; always on."""

    deepspeed_config: str | None = None
    """DeepSpeed JSON for settings that have no flag: offload_optimizer, offload_param, bucket sizes and the like."""

    zero_stage: ZeroStage = 0
    """What ZeRO partitions: 1 optimizer states, 2 and gradients, 3 and parameters. Default: the JSON's, else 0."""

    deepspeed_activation_checkpointing: bool = False
    """Recompute each block in the backward pass. FPDT always does so."""

    checkpoint_activations: bool = False
    """The same as --deepspeed-activation-checkpointing."""

    recompute_granularity: RecomputeGranularity | None = None
    """full is the same as --deepspeed-activation-checkpointing; selective is always on, because no attention kernel
    saves its probabilities for backward."""

    checkpoint_in_cpu: bool = False
    """Offload the checkpointed block inputs to host memory; with FPDT see --ds-sequence-parallel-fpdt-offloading."""

    cpu_optimizer: bool = False
    """Offload the optimizer states and the optimizer step to the host (ZeRO-Offload); needs --zero-stage 1 to 3."""
