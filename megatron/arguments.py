"""Command-line parser from argv to `Config`: one flag per field of the configuration dataclasses, as in Megatron.

A field's type determines the flag's form, and the string below the field is its --help:

    bool                switch; =false resets it  tuple[str, ...]     one or more words, or with int numbers
    int, float, str     one value                 Literal, StrEnum    one of these words, in any case; with `ALONE` in
                                                                      the field's metadata, no word means that one
Underscores and dashes in a flag's name are equivalent. --config names files of flags (`megatron.config.settings_file`),
which count as if they came first on the command line.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from megatron.config import (
    ALONE,
    AUTOMATIC_CHUNK,
    ChunkSize,
    Config,
    ConfigError,
    Folders,
    GibOrAuto,
    TokenCount,
    config_sections,
)
from megatron.config.model import ARCHITECTURE_FLAGS
from megatron.config.resolve import resolve
from megatron.config.settings_file import Setting, own_name, read_settings
from megatron.config.unknown_flags import describe_unknown
from megatron.config.upstream_flags import ACCEPTED, ANY, Accepted
from megatron.core.token_count import LARGEST, parse_token_count

DESCRIPTION = "Train GPT and LLaMA at ultra-long context: DeepSpeed ZeRO, Ulysses sequence parallelism and FPDT."
UPSTREAM_PREFIX = "upstream:"
FILES = "config"
SWITCH_VALUES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as YAML has them
Section = TypeVar("Section")
HELP_COLUMN, HELP_WIDTH = 34, 120


def parse_args(argv: Sequence[str]) -> Config:
    """Return the configuration that the command line (without the program's name) asks for.

    Fills in derived values and reads the file of --deepspeed-config. Call `megatron.config.checks.validate` next, once
    the number of ranks is known. --help prints and raises SystemExit(0).

    Raises:
        ConfigError: a flag is unknown, missing or malformed, flags contradict each other, or the file is unusable.
    """
    parser = build_parser()
    namespace = _parse(parser, expand_files(argv, parser))
    not_settings = (UPSTREAM_PREFIX, FILES)
    given = {name: value for name, value in vars(namespace).items() if not name.startswith(not_settings)}
    if "hf_model" in given:  # megatron.hf.settings reads these from the folder
        vars(namespace).update({name: 0 for name in _required_flags() if name in ARCHITECTURE_FLAGS - given.keys()})
    _require_flags(vars(namespace))
    sections = {name: section_of(namespace, section) for name, section in config_sections().items()}
    return resolve(Config(**sections, given=frozenset(given), notes=_upstream_notes(namespace)))


def expand_files(argv: Sequence[str], parser: argparse.ArgumentParser | None = None) -> list[str]:
    """Return the words of a command line, in this program's spelling, after those of the files that --config names.

    Raises:
        ConfigError: a file is unusable, or has a flag that is unknown or malformed; the message has its line.
    """
    parser = parser or build_parser()
    words = [_in_own_spelling(word) for word in argv]
    files = getattr(parser.parse_known_args(_without_reset_switches(words, parser))[0], FILES, ())
    settings = itertools.chain.from_iterable(read_settings(Path(file)) for file in files)
    return [*itertools.chain.from_iterable(_words_of(setting, parser) for setting in settings), *words]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: a group of flags per concern, and a group accepted for Megatron's scripts."""
    parser = _Parser(
        description=DESCRIPTION,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s FLAGS",
        formatter_class=_HelpFormatter,
    )
    group = parser.add_argument_group("Configuration files")
    text = "YAML files of flags. Flags on the command line win over them, and a file over those before it."
    group.add_argument(f"--{FILES}", nargs="+", action="extend", metavar="FILE", help=text)
    for section in config_sections().values():
        add_flags(parser, section)
    group = parser.add_argument_group("Accepted for Megatron's scripts, without effect")
    for flag in ACCEPTED:
        _add_upstream_flag(group, flag)
    return parser


def add_flags(parser: argparse.ArgumentParser, section: type) -> None:
    """Add a group with a flag per field of a dataclass; one that is not given gets the parser's `argument_default`."""
    group = parser.add_argument_group((section.__doc__ or "").splitlines()[0].rstrip("."))
    descriptions, annotations = field_descriptions(section), typing.get_type_hints(section, include_extras=True)
    for member in fields(section):
        _add_flag(group, member, annotations[member.name], descriptions[member.name])


def section_of(namespace: argparse.Namespace, section: Callable[..., Section]) -> Section:
    """Return the dataclass of the flags that `add_flags` added, with field defaults for flags not given."""
    values = {member.name: getattr(namespace, member.name, None) for member in fields(section)}  # type: ignore[arg-type]
    return section(**{name: value for name, value in values.items() if value is not None})


def field_descriptions(section: type) -> dict[str, str]:
    """Return the string literal below each field of a dataclass, field name to text."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    (class_definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    body = class_definition.body
    return {
        field.target.id: below.value.value
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps a flag's name on one line, so that it can be searched for."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN, width=HELP_WIDTH)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that the caller decides which rank prints the error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument ") + " (--help lists every flag)")


def _add_flag(group: argparse._ArgumentGroup, member: Field[Any], annotation: Any, description: str) -> None:
    flag = f"--{member.name.replace('_', '-')}"
    text = _help(member, description)
    kind = _without_none(annotation)
    if kind is bool:
        group.add_argument(flag, action="store_true", help=text)
    elif typing.get_origin(kind) is tuple:
        convert, metavar = _TUPLES[typing.get_args(kind)[0]]
        group.add_argument(flag, nargs="+", action=_AsTuple, type=convert, metavar=metavar, help=text)
    elif (choices := _choices(kind)) is not None:
        metavar = "{" + ",".join(map(str, choices)) + "}"
        alone = {"nargs": "?", "const": member.metadata[ALONE]} if ALONE in member.metadata else {}
        group.add_argument(flag, type=_one_of(choices), metavar=metavar, help=text, **alone)
    else:
        convert, metavar = _PARSERS[kind]
        group.add_argument(flag, type=convert, metavar=metavar, help=text)


def _add_upstream_flag(group: argparse._ArgumentGroup, flag: Accepted) -> None:
    name, destination = f"--{flag.name}", UPSTREAM_PREFIX + flag.name
    text = flag.why[0].upper() + flag.why[1:] + "."
    if not flag.values:
        group.add_argument(name, dest=destination, action="store_true", help=text)
    elif flag.values == ANY:
        group.add_argument(name, dest=destination, metavar="X", help=text)
    else:
        metavar = "{" + ",".join(flag.values) + "}"
        convert = _one_of(flag.values, flag.otherwise)
        group.add_argument(name, dest=destination, type=convert, metavar=metavar, help=text)


def _help(member: Field[Any], description: str) -> str:
    """Return a field's help with its default, if there is one to show and the text does not already state it."""
    if member.default is MISSING:
        description += " Required."
    elif "Default:" not in description and not any(member.default is omitted for omitted in (None, False, ())):
        description += f" Default: {_shown(member.default)}."
    return description.replace("%", "%%")


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _choices(kind: Any) -> Sequence[Any] | None:
    """Return the values that a field of this type may have; None if they are not listed."""
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return [*kind]
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else None


def _without_none(annotation: Any) -> Any:
    """Return X for X | None, and any other annotation as it is."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation
    (kind,) = (kind for kind in typing.get_args(annotation) if kind is not type(None))
    return kind


class _AsTuple(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def _whole_number(text: str) -> int:
    """Parse "32", and "3e11" too, which is common for token counts."""
    try:
        number = int(text) if text.lstrip("+-").isdecimal() else _exactly(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{_shortened(text)!r} is not a whole number; give one, such as 32") from None
    if abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"{_shortened(text)!r} is too large; give at most {LARGEST}")
    return number


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _exactly(value: float) -> int:
    if value != int(value):
        raise ValueError
    return int(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one, such as 0.1 or 3e-4") from None


def _one_of(choices: Sequence[Any], otherwise: str = "") -> Callable[[str], Any]:
    spellings = {str(choice).casefold(): choice for choice in choices}

    def parse(text: str) -> Any:
        if text.casefold() not in spellings:
            reason = otherwise or f"use one of {', '.join(map(str, choices))}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'honored' if otherwise else 'known'}; {reason}")
        return spellings[text.casefold()]

    return parse


def token_count(text: str) -> int:
    """Parse a number of tokens such as 131072, 128K or 1M, as a type for argparse."""
    try:
        return parse_token_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _chunk_size(text: str) -> int:
    return AUTOMATIC_CHUNK if text.casefold() == "auto" else token_count(text)


def _folders(text: str) -> tuple[str, ...]:
    folders = tuple(text.split(","))
    if not all(folders):
        raise argparse.ArgumentTypeError(f"{text!r} names an empty folder; give one, or several as /disk1,/disk2")
    return folders


def _gib_or_auto(text: str) -> float | None:
    return None if text.casefold() == "auto" else _number(text)


_PARSERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (_whole_number, "N"),
    float: (_number, "X"),
    str: (str, "TEXT"),
    TokenCount: (token_count, "TOKENS"),
    ChunkSize: (_chunk_size, "TOKENS|auto"),
    GibOrAuto: (_gib_or_auto, "X|auto"),
    Folders: (_folders, "DIR[,DIR...]"),
}

# Parsers of flags with several values, by the type of one value.
_TUPLES: dict[Any, tuple[Callable[[str], Any], str]] = {str: (str, "WORD"), int: (_whole_number, "N")}


def _in_own_spelling(word: str) -> str:
    """Rewrite a flag's name with dashes and without aliases; leave its value and every other word unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{own_name(name)}{equals}{value}"


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(_without_reset_switches(words, parser))
    if unknown:
        raise ConfigError(describe_unknown(unknown, _known_flags()))
    return namespace


def _without_reset_switches(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the words with --SWITCH for --SWITCH=true, and without a switch that a later --SWITCH=false resets."""
    switches, left = _switches(parser), list[str]()
    for word in words:
        flag, equals, value = word.partition("=")
        if not equals or flag not in switches:
            left.append(word)
            continue
        if value.casefold() not in SWITCH_VALUES:
            raise ConfigError(f"{flag} is a switch, and {value!r} is given; use true or false")
        left = [other for other in left if other != flag]
        if SWITCH_VALUES[value.casefold()]:
            left.append(flag)
    return left


def _words_of(setting: Setting, parser: argparse.ArgumentParser) -> list[str]:
    """Return a setting of a file as words of the command line. ConfigError, with its place, where they are wrong."""
    flag, value = f"--{setting.name}", setting.value
    action = parser._option_string_actions.get(flag)
    if action is None or action.dest in (FILES, "help"):
        message = describe_unknown([flag], _known_flags())
    elif not isinstance(value, str) and action.nargs != "+":
        message = f"{flag} takes one value, and a list is given; write NAME: VALUE"
    else:
        words = [f"{flag}={value}"] if isinstance(value, str) else [flag, *value]
        try:
            _parse(parser, words)
        except ConfigError as error:
            raise ConfigError(f"{setting.place}: {error}") from None
        return words
    raise ConfigError(f"{setting.place}: {message}")


def _switches(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags without a value."""
    return {flag for flag, action in parser._option_string_actions.items() if action.nargs == 0}


def _required_flags() -> list[str]:
    """Return the names of the fields without a default, in the order of --help."""
    members = [member for section in config_sections().values() for member in fields(section)]
    return [member.name for member in members if member.default is MISSING]


def _require_flags(given: dict[str, Any]) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in _required_flags() if name not in given]
    if missing:
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise ConfigError(f"{', '.join(missing)} {verb} required and not given; add {them}")


def _upstream_notes(namespace: argparse.Namespace) -> tuple[str, ...]:
    values = vars(namespace)
    given = [flag for flag in ACCEPTED if UPSTREAM_PREFIX + flag.name in values]
    return tuple(f"--{flag.name} has no effect: {flag.why}" for flag in given)


def _known_flags() -> list[str]:
    members = (member.name for section in config_sections().values() for member in fields(section))
    return [*(name.replace("_", "-") for name in members), *(flag.name for flag in ACCEPTED), FILES]
