"""Observers of a stream: they see its work as it runs, and change none of it."""

from __future__ import annotations

from torch import Tensor

# The values of a layer that are noted; in the backward pass, their gradients.
PROJECTED = ("queries", "keys and values")
INPUT, ATTENTION_OUTPUT, OUTPUT = "input", "attention output", "output"


class Observer:
    """Ignores what it sees. `phase` is "forward", "recompute" (forward again) or "backward"; layers count from 1."""

    def begin_chunk(self, phase: str, layer_number: int, chunk: int) -> None:
        """See that a layer begins to work on a chunk."""

    def note(self, phase: str, what: str, layer_number: int | None, chunk: int | None, value: Tensor) -> None:
        """See a value that was computed, on the compute device; no layer: outside of them, no chunk: of all tokens."""

    def note_token_losses(self, losses: Tensor) -> None:
        """See the masked losses of the next tokens, flat, of a loss that is computed without gradients."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def begin_chunk(self, phase: str, layer_number: int, chunk: int) -> None:
        for observer in self._observers:
            observer.begin_chunk(phase, layer_number, chunk)

    def note(self, phase: str, what: str, layer_number: int | None, chunk: int | None, value: Tensor) -> None:
        for observer in self._observers:
            observer.note(phase, what, layer_number, chunk, value)

    def note_token_losses(self, losses: Tensor) -> None:
        for observer in self._observers:
            observer.note_token_losses(losses)
