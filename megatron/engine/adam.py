"""Choice of the Adam implementation: DeepSpeed's kernels if they build, else apex's or torch's."""

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
    """Build AdamW over the parameter groups; `on_host` if ZeRO offloads the optimizer states to host memory."""
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
    """Allocate zero moments for the master weights, to be filled, and set the step count.

    Each Adam stores the count differently: torch's as a tensor (on the device if its kernel is fused), DeepSpeed's as a
    number per weight, and apex's as a number per group.
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
    """Return whether DeepSpeed can compile and load one of its extensions here; it can fail in many ways."""
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
    """Strip letters from the TORCH_CUDA_ARCH_LIST that DeepSpeed's builder has read: it (0.19.8) accepts only numbers.

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
    """Return apex's Adam, or None if apex is not installed or was built without its CUDA extensions."""
    try:
        import amp_C  # noqa: F401  the extensions, which apex imports only when an optimizer is built
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam
