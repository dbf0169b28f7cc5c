"""Settings of torch's GPU memory allocator, which it reads from the environment when it is first used."""

from __future__ import annotations

from collections.abc import MutableMapping

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Let memory segments grow: chunks that fill the GPU come in many sizes, and would leave holes in fixed segments.

    Call it before torch is imported. What the environment says already stays.
    """
    if not any(name in environment for name in NAMES):
        environment[NAMES[0]] = "expandable_segments:True"
