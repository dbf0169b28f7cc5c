"""Jinja in a sandbox, with the extras that chat templates of Hugging Face expect and the marks of {% generation %}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.data.errors import DataError
from megatron.finetuning.time_limit import TimeLimitExceeded, cpu_time_limit

Span = tuple[int, int]  # first character, one past the last
SECONDS_TO_RENDER = 10.0  # of CPU time; a conversation of a million tokens takes less than one
BEGIN, END = "\ufdd0", "\ufdd1"  # Unicode reserves these for use within a program; text has none
MARKS = re.compile(f"[{BEGIN}{END}]")
GENERATION = re.compile(r"{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Rendering:
    """A text, and the spans that the template marks as generated."""

    text: str
    generated: tuple[Span, ...]


@dataclass(frozen=True)
class CompiledTemplate:
    """A template, and whether it marks what is generated."""

    template: jinja2.Template
    marks: bool


def compile_template(source: str) -> CompiledTemplate:
    """Compile a template, in a sandbox. Raises whatever the compiler raises."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    with cpu_time_limit(SECONDS_TO_RENDER):  # the compiler evaluates constant expressions
        return CompiledTemplate(environment.from_string(source), bool(GENERATION.search(source)))


def render(compiled: CompiledTemplate, variables: Mapping[str, Any]) -> Rendering:
    """Render a template. DataError if it fails, or takes too long."""
    try:
        with cpu_time_limit(SECONDS_TO_RENDER):
            marked = compiled.template.render(variables)
    except (Exception, TimeLimitExceeded) as error:  # a template is a program and may raise anything
        raise DataError(
            f"the chat template refuses it: {reason(error)}; change the line or --chat-template."
        ) from error
    if not compiled.marks:
        return Rendering(marked, ())
    if MARKS.search(json.dumps([variables["messages"], variables["tools"]], ensure_ascii=False)):
        raise DataError("it has a character U+FDD0 or U+FDD1, which Unicode keeps out of texts; remove it.")
    bounds = [match.start() - earlier for earlier, match in enumerate(MARKS.finditer(marked))]
    if MARKS.findall(marked) != [BEGIN, END] * (len(bounds) // 2):
        raise DataError("the chat template nests {% generation %} or cuts its text; give another --chat-template.")
    return Rendering(MARKS.sub("", marked), tuple(zip(bounds[::2], bounds[1::2], strict=True)))


def reason(error: BaseException) -> str:
    """Describe a template's error in one line."""
    message = " ".join(str(error).split())
    known = isinstance(error, jinja2.TemplateError | TimeLimitExceeded) and message
    return message if known else f"{type(error).__name__}: {message}"


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark what the model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialize to JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
