"""The error of checkpoints, whose message is one line."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be read or written, or is not of this model."""
