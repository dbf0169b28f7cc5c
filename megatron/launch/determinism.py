"""Deterministic mode: the same run twice on the same GPUs gives the same bits.

The switch is torch's own; its kernels read it, and so does `megatron.ops`. Two libraries are set through the
environment: cuBLAS uses one workspace per stream, and NCCL does not sum in the NVLink switch, whose order of additions
is not fixed.
"""

from __future__ import annotations

import os

import torch

from megatron.config import ConfigError

# What a variable may be; the first is set where there is none.
VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_NVLS_ENABLE": ("0",)}


def use_deterministic_kernels(device_type: str) -> None:
    """Choose deterministic kernels for the rest of the process. Call it before any work on a GPU.

    An operation that has none then raises RuntimeError. ConfigError if the environment says otherwise.
    """
    if device_type == "cuda":
        for name, allowed in VARIABLES.items():
            value = os.environ.setdefault(name, allowed[0])
            if value not in allowed:
                raise ConfigError(
                    f"the environment's {name} ({value}) must be {' or '.join(allowed)} with --deterministic-mode; "
                    "change it, or unset it"
                )
    torch.use_deterministic_algorithms(True)
    # Filling costs time, and no result depends on memory that nothing has written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
