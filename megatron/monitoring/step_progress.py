"""Progress of a step from what its stream does."""

from __future__ import annotations

from megatron.fpdt.observer import Observer
from megatron.logging.progress import StepProgress


class ProgressObserver(Observer):
    """Advances the progress of the step by each chunk of each layer."""

    def __init__(self, progress: StepProgress) -> None:
        self._progress = progress

    def begin_chunk(self, phase: str, layer_number: int, chunk: int) -> None:
        self._progress.advance(phase, layer_number, chunk)
