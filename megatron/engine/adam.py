"""Which Adam steps the parameters: DeepSpeed's own kernels where they build, else apex's or torch's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron.config import OptimizerConfig

logger = logging.getLogger("megatron")


def build_adam(
    groups: Sequence[dict[str, Any]], config: OptimizerConfig, device: torch.device, on_host: bool
) -> torch.optim.Optimizer:
    """AdamW over the parameter groups; `on_host` when ZeRO keeps the optimizer states in host memory."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        if _builds("CPUAdamBuilder"):
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    elif device.type == "cuda":
        from deepspeed.ops.adam import FusedAdam

        if _builds("FusedAdamBuilder"):
            return FusedAdam(groups, adam_w_mode=True, **settings)
        if (apex_adam := _apex_adam()) is not None:
            return apex_adam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=device.type == "cuda" and not on_host, **settings)


def _builds(builder_name: str) -> bool:
    """Whether DeepSpeed can compile and load one of its extensions here; there are many ways in which it may not."""
    from deepspeed.ops import op_builder

    builder = getattr(op_builder, builder_name)()
    try:
        builder.load(verbose=False)
    except Exception as error:
        logger.info("%s does not build here (%s); Adam is another", builder.name, str(error).strip().split("\n")[0])
        return False
    return True


def _apex_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """apex's Adam, or None where apex is not installed or was built without its CUDA extensions."""
    try:
        import amp_C  # noqa: F401  the extensions, which apex asks for only when an optimizer is made
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam
