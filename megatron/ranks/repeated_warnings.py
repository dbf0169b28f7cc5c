"""Warnings that libraries repeat on every rank: rank 0 shows each once, and other ranks leave it to rank 0.

Only the warnings named here are held back. What they say depends on the machine or the kernel, not on the rank.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TextIO

ALL_WARNINGS = "MEGATRON_ALL_WARNINGS"  # 1 in the environment shows every warning on every rank
REPEATED = (
    "Setting accelerator to CPU",  # DeepSpeed, without a GPU
    "aux_data",  # flash-attn-4, of every kernel that it compiles
)


def show_repeated_warnings_once(environment: Mapping[str, str]) -> None:
    """Hold back repeated warnings of this process, whose rank the environment says.

    Call it before DeepSpeed is imported, which warns at import.
    """
    if environment.get(ALL_WARNINGS, "0") not in ("", "0"):
        return
    once, show = _Once(is_first_rank=environment.get("RANK", "0") == "0"), warnings.showwarning

    def show_once(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if once.shows(str(message), filename, lineno):
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_once
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: once.shows(record.getMessage(), record.pathname, record.lineno)
    )


class _Once:
    """Remembers which repeated warnings were shown, each by the line of code that warns."""

    def __init__(self, is_first_rank: bool) -> None:
        self._is_first_rank = is_first_rank
        self._shown: set[tuple[str, str, int]] = set()

    def shows(self, text: str, path: str, line: int) -> bool:
        """Return whether this rank shows a warning."""
        warning = next((phrase for phrase in REPEATED if phrase in text), None)
        if warning is None:
            return True
        place = warning, path, line
        is_new = place not in self._shown
        self._shown.add(place)
        return self._is_first_rank and is_new
