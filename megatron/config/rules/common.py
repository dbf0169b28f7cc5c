"""The argument of every rule, and the helpers that format its message.

A message states what is wrong, what was given, what is allowed and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron.config.batch import data_parallel_size
from megatron.config.config import Config, config_sections


@dataclass(frozen=True)
class Run:
    """A configuration, with the number of ranks and the device type that it is to run on."""

    config: Config
    world_size: int
    device_type: str

    @property
    def data_parallel_size(self) -> int:
        return data_parallel_size(self.config, self.world_size)


Rule = Callable[[Run], str | None]


def flag(name: str) -> str:
    """Return a setting's flag."""
    return "--" + name.replace("_", "-")


def value_of(config: Config, name: str) -> Any:
    """Return a setting's value, from the section that has it."""
    for section_name, section in config_sections().items():
        if name in (member.name for member in fields(section)):
            return getattr(getattr(config, section_name), name)
    raise KeyError(name)


def shown(config: Config, name: str) -> str:
    """Return "--flag (value)", or the flag alone for a switch."""
    value = value_of(config, name)
    if isinstance(value, bool):
        return flag(name)
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"{flag(name)} ({value:g})" if isinstance(value, float) else f"{flag(name)} ({value})"


def given_flags(config: Config, names: Sequence[str]) -> list[str]:
    """Return those of `names` that the user gave, in that order."""
    return [name for name in names if name in config.given]


def listed(values: Sequence[Any], joint: str = "or") -> str:
    """Return "1, 2 or 4"."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joint} {words[-1]}"


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_multiples(value: int, factor: int) -> list[int]:
    """Return the positive multiples of `factor` just below and just above `value`."""
    below = value // factor * factor
    return [multiple for multiple in (below, below + factor) if multiple > 0]
