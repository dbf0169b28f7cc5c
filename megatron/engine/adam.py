"""Which Adam steps the parameters: DeepSpeed's own kernels where they build, else apex's or torch's."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.config import OptimizerConfig
from megatron.weights.source import MOMENTS

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

        if _builds("CPUAdamBuilder", "torch's AdamW"):
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    elif device.type == "cuda":
        from deepspeed.ops.adam import FusedAdam

        apex_adam = _apex_adam()
        if _builds("FusedAdamBuilder", "torch's fused AdamW" if apex_adam is None else "apex's FusedAdam"):
            return FusedAdam(groups, adam_w_mode=True, **settings)
        if apex_adam is not None:
            return apex_adam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=device.type == "cuda" and not on_host, **settings)


def set_moments(adam: torch.optim.Optimizer, masters: Iterable[Tensor], step: int) -> None:
    """Give the master weights moments of zeros, to be filled, and the count of steps taken.

    Each Adam keeps the count in its own way: torch's as a tensor (on the device if its kernel is fused), DeepSpeed's
    as a number with the weights, and apex's as a number with the group.
    """
    is_torch = isinstance(adam, torch.optim.AdamW)
    on_device = is_torch and adam.param_groups[0]["fused"]
    for group in adam.param_groups if not is_torch else ():
        group["step"] = step
    for master in masters:
        count = torch.tensor(float(step), device=master.device if on_device else "cpu") if is_torch else step
        moments = {moment: torch.zeros_like(master.detach()) for moment in MOMENTS}
        adam.state[master] = {"step": count, **moments}


def _builds(builder_name: str, substitute: str) -> bool:
    """Whether DeepSpeed can compile and load one of its extensions here; there are many ways in which it may not."""
    from deepspeed.ops import op_builder

    builder = _with_readable_architectures(getattr(op_builder, builder_name)())
    try:
        builder.load(verbose=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        logger.info("DeepSpeed's %s does not build here (%s); Adam is %s", builder.name, reason, substitute)
        return False
    return True


def _with_readable_architectures(builder: Any) -> Any:
    """Take the letters off what DeepSpeed's builder has read of TORCH_CUDA_ARCH_LIST: it (0.19.8) knows numbers alone.

    Many images are configured with "9.0a". An elementwise kernel needs none of the instructions that it adds to "9.0".
    """
    read = getattr(builder, "compute_capability_args", None)
    if read is None:  # a builder for another accelerator
        return builder

    def compute_capability_args(*arguments: Any) -> Any:
        builder._jit_arch_list = re.sub(r"(?<=\d)[a-z]\b", "", builder._jit_arch_list or "") or None
        return read(*arguments)

    builder.compute_capability_args = compute_capability_args
    return builder


def _apex_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """apex's Adam, or None where apex is not installed or was built without its CUDA extensions."""
    try:
        import amp_C  # noqa: F401  the extensions, which apex asks for only when an optimizer is made
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam
