"""Hugging Face models: their settings, and all that lets an ordinary transformers model be streamed."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Return `stream_model`, which imports transformers: native models do not need it."""
    if name != "stream_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron.hf.library import stream_model

    return stream_model
