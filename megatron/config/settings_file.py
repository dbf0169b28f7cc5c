"""Configuration files: YAML whose keys are the names of flags, with dashes or underscores, and whose values are theirs.

    seq_length: 256K                # as on the command line
    data_path: [0.3, A, 0.7, B]     # a flag that takes several words
    optimizer:                      # a heading; any name, for the reader alone
      lr: 1e-4
      override_opt_param_scheduler: true

A value is the text in the file, which the flag parses as it does on the command line: YAML 1.1 would read 1e-4 as a
string, 010 as 8 and off as false.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from megatron.config.config import Config, config_sections
from megatron.config.errors import ConfigError
from megatron.config.model import TokenCount
from megatron.config.parallel import AUTOMATIC_CHUNK, ChunkSize
from megatron.config.upstream_flags import ALIASES
from megatron.core.token_count import format_token_count

SETTINGS_FILE = "run.yaml"
_HEAD = "# The settings of a run: give them back with --config. Flags on the command line win.\n"
LARGEST_PLAIN = 1e15  # below it, digits are as exact as an exponent, and shorter to read
_NULL = "tag:yaml.org,2002:null"
_OF_A_LAUNCH = frozenset({"local_rank"})  # set by the launcher, for one rank


@dataclass(frozen=True)
class Setting:
    """One flag in a file: its name with dashes, its text or its list of texts, and its place as FILE:LINE."""

    name: str
    value: str | tuple[str, ...]
    place: str


def own_name(name: str) -> str:
    """Return the name of a flag in this program's spelling: with dashes, and without Megatron-DeepSpeed's aliases."""
    name = name.replace("_", "-")
    return ALIASES.get(name, name)


def read_settings(path: Path) -> list[Setting]:
    """Return the settings of a file, in its order.

    Raises:
        ConfigError: the file cannot be read, is no YAML, has another form, or sets a flag twice.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config ({path}): {error.strerror}; name a YAML file of flags") from error
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(_describe_invalid(path, error)) from error
    lines: dict[str, tuple[int, str]] = {}
    settings = []
    for key, value in _entries(root, path):
        name, line = own_name(key.value), key.start_mark.line + 1
        place = f"{path}:{line}"
        if name in lines:
            first, spelling = lines[name]
            spelled = "" if spelling == key.value else f" as {spelling}"
            raise ConfigError(f"{place}: {key.value} is set in line {first}{spelled}, too; keep one of them")
        lines[name] = line, key.value
        settings.append(Setting(name, _words(key.value, value, place), place))
    return settings


def _describe_invalid(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = path if mark is None else f"{path}:{mark.line + 1}"
    reason = getattr(error, "problem", None) or (
        "values are nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
    )
    return f"{place}: this is not valid YAML ({reason}); write one NAME: VALUE per line, and quote special characters"


def _entries(root: yaml.Node | None, path: Path) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Yield the key and the value of each setting, also of those below a heading."""
    if root is None:
        return
    for key, value in _pairs(root, path):
        if isinstance(value, yaml.MappingNode):
            yield from _pairs(value, path)
        else:
            yield key, value


def _pairs(node: yaml.Node, path: Path) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: there are no settings here; write NAME: VALUE lines")
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: a key must be the name of a flag; write NAME: VALUE")
        yield key, value


def _words(key: str, value: yaml.Node, place: str) -> str | tuple[str, ...]:
    """Return the text of a value, or the texts of a list."""
    if isinstance(value, yaml.SequenceNode):
        texts = [_words(key, each, place) for each in value.value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{place}: the list of {key} must hold words or numbers; give at least one, and no lists")
        return tuple(map(str, texts))
    if not isinstance(value, yaml.ScalarNode):
        raise ConfigError(f"{place}: {key} is below two headings; use at most one")
    if value.tag == _NULL:
        raise ConfigError(f"{place}: {key} has no value; give one, or remove the line for the default")
    return str(value.value)


def settings_text(config: Config) -> str:
    """Return a file with what was given of a configuration: `--config` with it gives the same configuration.

    Everything else has its default or was derived, and is again. Flags without effect here are left out.
    """
    return _HEAD + "".join(
        yaml.safe_dump({name: values}, sort_keys=False, default_flow_style=False, width=math.inf)
        for name, values in given_settings(config).items()
    )


def settings_lines(config: Config) -> list[str]:
    """Return the same for the log, a line for each section."""
    return [
        f"{name}: {yaml.safe_dump(values, sort_keys=False, default_flow_style=True, width=math.inf).strip()}"
        for name, values in given_settings(config).items()
    ]


def given_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Return the values that were given, by section and name, as YAML has them."""
    given = {}
    for name, section in config_sections().items():
        kinds = typing.get_type_hints(section, include_extras=True)
        values = {
            member.name: _plain(getattr(getattr(config, name), member.name), kinds[member.name])
            for member in fields(section)
            if member.name in config.given - _OF_A_LAUNCH
        }
        if values:
            given[name] = values
    return given


def _plain(value: Any, kind: Any) -> Any:
    """Return a value as its flag is written; lengths in K or M."""
    if value is None or (kind is ChunkSize and value == AUTOMATIC_CHUNK):
        return "auto"
    if {kind, *typing.get_args(kind)} & {TokenCount, ChunkSize}:
        return _token_count_text(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_PLAIN:
        return int(value)
    if isinstance(value, tuple):
        return list(value) if typing.get_origin(kind) is tuple else ",".join(map(str, value))
    return value


def _token_count_text(count: int) -> str | int:
    text = format_token_count(count)
    return count if text.isdecimal() else text
